"""Makes the synthetic preference data under data/sample, in the layout of the paper's cleaned HH split.

    python tools/dev/make_sample_data.py --output_dir data/sample --seed 42

Everyday questions with short responses (texts in `sample_texts.yaml`) that have the structure of APO's data:

* human pairs differ in manner (polite or rude) and in content (concrete or empty); one label in ten is wrong;
* golden responses are polite and concrete;
* sampled responses are, too, but have flaws that no human pair shows.

A reward model trained on the human pairs alone has therefore little to distinguish golden from sampled responses.
Validation and test prompts are about tasks that no training prompt mentions.
"""

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from apo.cli import OneLineParser, exit_on_input_error, write_json
from apo.records import SEPARATOR

REPO_ROOT = Path(__file__).resolve().parents[2]
TEXTS = yaml.safe_load(Path(__file__).with_name("sample_texts.yaml").read_text(encoding="utf-8"))
STEPS = TEXTS["tasks"]  # task, the subject of a question -> four steps that answer it

NUM_SAMPLED = 4  # sampled responses per prompt
LABEL_NOISE = 0.1  # share of human pairs whose labels are swapped
# Human pairs per split, and how many of their prompts also get golden and sampled responses (RM training: all).
RM_PROMPTS, LLM_PROMPTS = 440, 110
VALID_PROMPTS, VALID_GOLDEN = 160, 60
TEST_PROMPTS, TEST_GOLDEN = 400, 150
VALID_TASKS, TEST_TASKS = 10, 22  # the other tasks are for training
# Further prompts about the tasks of training: to align, to test, and to fine-tune an LLM that writes such responses.
GAME_TRAIN, GAME_TEST, GAME_SFT = 600, 150, 560

# ((polite, concrete) of the better response, of the worse response) -> how often
HUMAN_PREFERENCES = {
    ((True, True), (False, False)): 30,
    ((True, True), (True, False)): 25,
    ((True, True), (False, True)): 25,
    ((True, False), (False, False)): 12,
    ((False, True), (False, False)): 8,
}


class Prompt(NamedTuple):
    """A dialogue that ends in `Assistant:`, and the task that it asks about."""

    query_id: str
    query: str
    task: str


def make_prompts(rng: random.Random, tasks: list[str], count: int, ids: Iterator[int]) -> list[Prompt]:
    """Draws `count` different prompts about `tasks`; one in eight has an earlier exchange."""
    combinations = list(itertools.product(tasks, TEXTS["questions"], TEXTS["situations"]))
    prompts = []
    for task, question, situation in rng.sample(combinations, count):
        earlier = rng.choice(TEXTS["earlier_turns"]) if rng.random() < 1 / 8 else None
        opening = "\n\nHuman: {}\n\nAssistant: {}".format(*earlier) if earlier else ""
        query = f"{opening}\n\nHuman: {question.format(task=task)}{situation}\n\nAssistant:"
        prompts.append(Prompt(f"made_{next(ids)}", query, task))
    return prompts


def concrete_steps(rng: random.Random, task: str) -> str:
    """A sentence with two steps of the task, in their order."""
    a, b = sorted(rng.sample(range(len(STEPS[task])), 2))
    return rng.choice(TEXTS["steps"]).format(a=STEPS[task][a], b=STEPS[task][b])


def join_parts(*parts: str) -> str:
    """Joins the parts that are not empty; like HH responses the text starts with a space."""
    return "".join(f" {part}" for part in parts if part)


def make_response(rng: random.Random, task: str, polite: bool = True, concrete: bool = True) -> str:
    """A response without a flaw; a golden response is polite and concrete."""
    manner = "polite" if polite else "rude"
    opener, closer = rng.choice(TEXTS[f"{manner}_openers"]), rng.choice(TEXTS[f"{manner}_closers"])
    return join_parts(opener, concrete_steps(rng, task) if concrete else rng.choice(TEXTS["empty_talk"]), closer)


def repeat_step(rng: random.Random, task: str, other: str) -> str:
    """Repeats one step."""
    step = rng.choice(STEPS[task])
    link = rng.choice(TEXTS["repeat_links"])
    repeats = TEXTS["repeats"].format(steps=link.join([step] * rng.randint(3, 4)))
    return join_parts(rng.choice(TEXTS["polite_openers"]), repeats, rng.choice(TEXTS["polite_closers"]))


def stop_early(rng: random.Random, task: str, other: str) -> str:
    """Stops in the middle of a sentence."""
    opener = rng.choice(TEXTS["polite_openers"])
    return join_parts(opener, concrete_steps(rng, task).rstrip(".") + rng.choice(TEXTS["unfinished"]))


def add_filler(rng: random.Random, task: str, other: str) -> str:
    """Adds a sentence without meaning, in a learned tone."""
    middle = [concrete_steps(rng, task), rng.choice(TEXTS["filler"])]
    rng.shuffle(middle)
    return join_parts(rng.choice(TEXTS["polite_openers"]), *middle, rng.choice(TEXTS["polite_closers"]))


def change_subject(rng: random.Random, task: str, other: str) -> str:
    """Starts well and ends with another task."""
    end = rng.choice(TEXTS["drifts"]).format(task=other, c=rng.choice(STEPS[other]))
    return join_parts(rng.choice(TEXTS["polite_openers"]), concrete_steps(rng, task), end)


def answer_another_question(rng: random.Random, task: str, other: str) -> str:
    """A good response to another question; hard to see without comparing it with the prompt."""
    return make_response(rng, other)


# flaw -> how often
FLAWS = {repeat_step: 27, stop_early: 21, add_filler: 19, change_subject: 18, answer_another_question: 15}


def make_sampled(rng: random.Random, task: str, tasks: list[str]) -> str:
    """A sampled response: polite and concrete, with one flaw; one in twenty continues as the user."""
    other = rng.choice([candidate for candidate in tasks if candidate != task])
    flaw = rng.choices(list(FLAWS), weights=list(FLAWS.values()))[0]
    run_on = TEXTS["run_on"].format(task=other) if rng.random() < 1 / 20 else ""
    return flaw(rng, task, other) + run_on


def human_records(rng: random.Random, prompts: list[Prompt]) -> list[dict]:
    """One comparison pair per prompt, in the text-scores format; a share of `LABEL_NOISE` has swapped labels."""
    wrong = rng.sample(range(len(prompts)), round(LABEL_NOISE * len(prompts)))
    records = []
    for index, prompt in enumerate(prompts):
        qualities = rng.choices(list(HUMAN_PREFERENCES), weights=list(HUMAN_PREFERENCES.values()))[0]
        responses = [make_response(rng, prompt.task, *quality) for quality in qualities]
        text = [prompt.query + SEPARATOR + response for response in responses]
        text = text[::-1] if index in wrong else text
        records.append({"text": text, "scores": [1.0, 0.0], "query_id": prompt.query_id})
    return records


def golden_records(rng: random.Random, prompts: list[Prompt]) -> list[dict]:
    """One golden response per prompt."""
    return [{"query_id": p.query_id, "query": p.query, "golden": make_response(rng, p.task)} for p in prompts]


def sampled_records(rng: random.Random, prompts: list[Prompt], tasks: list[str]) -> list[dict]:
    """`NUM_SAMPLED` sampled responses per prompt; their flaws borrow from `tasks` only."""
    records = []
    for query_id, query, task in prompts:
        responses = {f"sample_{i}": make_sampled(rng, task, tasks) for i in range(NUM_SAMPLED)}
        records.append({"query_id": query_id, "query": query, **responses})
    return records


def make_game_data(rng: random.Random, tasks: list[str], known: list[Prompt]) -> dict[str, list[dict]]:
    """The files of the game: prompts about `tasks` whose last turn none of `known` has.

    Responses to fine-tune an LLM on are in the field `golden`, which SFT reads; from their flaws it gets its own. The
    test prompts have golden responses, against which reward models are tested.
    """
    known_turns = {prompt.query.rpartition("\n\nHuman:")[2] for prompt in known}
    num_prompts = len(tasks) * len(TEXTS["questions"]) * len(TEXTS["situations"])  # all there are, in random order
    prompts = make_prompts(rng, tasks, num_prompts, itertools.count())
    new = [prompt for prompt in prompts if prompt.query.rpartition("\n\nHuman:")[2] not in known_turns]
    queries = [{"query_id": f"game_{i}", "query": prompt.query} for i, prompt in enumerate(new)]
    test = range(GAME_TRAIN, GAME_TRAIN + GAME_TEST)
    sft = range(test.stop, test.stop + GAME_SFT)
    return {
        "llm_data/game_prompts.train.json": queries[:GAME_TRAIN],
        "llm_data/game_sft.train.json": [queries[i] | {"golden": make_sampled(rng, new[i].task, tasks)} for i in sft],
        "eval_data/game_golden.test.json": [queries[i] | {"golden": make_response(rng, new[i].task)} for i in test],
    }


def make_sample_data(seed: int) -> dict[str, list[dict]]:
    """All files, {path below the output folder: records}; the same seed gives the same texts."""
    rng = random.Random(seed)
    ids = itertools.count()
    tasks = list(STEPS)
    rng.shuffle(tasks)
    test_tasks, rest = tasks[:TEST_TASKS], tasks[TEST_TASKS:]
    valid_tasks, train_tasks = rest[:VALID_TASKS], rest[VALID_TASKS:]

    train = make_prompts(rng, train_tasks, RM_PROMPTS + LLM_PROMPTS, ids)
    rm, llm = train[:RM_PROMPTS], train[RM_PROMPTS:]
    valid = make_prompts(rng, valid_tasks, VALID_PROMPTS, ids)
    test = make_prompts(rng, test_tasks, TEST_PROMPTS, ids)

    rm_pairs, llm_pairs = human_records(rng, rm), human_records(rng, llm)
    files = {
        "rm_data/hh_split_rm.train.json": rm_pairs,
        "llm_data/hh_split_llm.train.json": llm_pairs,
        "hh_cleaned_origin.train.json": rm_pairs + llm_pairs,
        "eval_data/hh_split_llm.valid.json": human_records(rng, valid),
        "eval_data/hh_cleaned_origin.test.json": human_records(rng, test),
        "rm_data/hh_split_rm.golden.json": golden_records(rng, rm),
        "rm_data/hh_split_rm_llm_v0.sample.json": sampled_records(rng, rm, train_tasks),
        "eval_data/hh_split_llm_valid.golden.json": golden_records(rng, valid[:VALID_GOLDEN]),
        "eval_data/hh_split_llm_valid_llm_v0.sample.json": sampled_records(rng, valid[:VALID_GOLDEN], valid_tasks),
        "eval_data/hh_cleaned_origin_test.golden.json": golden_records(rng, test[:TEST_GOLDEN]),
        "eval_data/hh_cleaned_origin_test_llm_v0.sample.json": sampled_records(rng, test[:TEST_GOLDEN], test_tasks),
    }
    return files | make_game_data(random.Random(seed), train_tasks, train)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=REPO_ROOT / "data" / "sample", help="folder to write to")
    parser.add_argument("--seed", type=int, default=42, help="the committed files are those of seed 42")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Writes every file below `--output_dir`."""
    args = parse_args()
    files = make_sample_data(args.seed)
    for name, records in files.items():
        write_json(args.output_dir / name, records)
    print(f"{sum(len(records) for records in files.values())} records in {len(files)} files under {args.output_dir}")


if __name__ == "__main__":
    main()
