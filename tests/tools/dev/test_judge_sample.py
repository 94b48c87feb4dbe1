"""tools/dev/judge_sample.py: agrees with the generator on every response, and decides what no template gives."""

import itertools
import random

import pytest
from conftest import read_json, run_tool, write_records

from apo.cli import InputError
from tools.dev.judge_sample import judge, judge_file, share_of_prompts, task_of
from tools.dev.make_sample_data import FLAWS, TEXTS, make_response, make_sampled

TASKS = list(TEXTS["tasks"])
FLAW_NAMES = {
    "repeat_step": "repeats",
    "stop_early": "stops_early",
    "add_filler": "filler",
    "change_subject": "changes_subject",
    "answer_another_question": "answers_another_question",
}
GOOD = {"polite", "concrete", "right_task"}
QUERY = "\n\nHuman: Is it hard to descale a kettle?\n\nAssistant:"


def verdict(response: str, task: str = "descale a kettle") -> set[str]:
    """What holds of the response; the steps: fill it halfway with vinegar, boil it once, let it stand an hour, ..."""
    return {name for name, holds in judge(task, response).items() if holds}


def golden_responses(task: str) -> set[str]:
    """Every flawless response to a question about `task`, written out."""
    pairs = list(itertools.combinations(TEXTS["tasks"][task], 2))
    steps = [template.format(a=a, b=b) for template in TEXTS["steps"] for a, b in pairs]
    parts = itertools.product(TEXTS["polite_openers"], steps, set(TEXTS["polite_closers"]))
    return {" " + " ".join(filter(None, part)) for part in parts}


# ------------------------------------------------------------------------------------------------ the generator


@pytest.mark.parametrize("polite", [True, False])
@pytest.mark.parametrize("concrete", [True, False])
def test_responses_without_a_flaw(polite, concrete):
    holds = {"polite": polite, "concrete": concrete, "right_task": concrete, "flawless": polite and concrete}
    expected = {name for name in holds if holds[name]}
    rng = random.Random(0)
    for task in TASKS * 5:
        response = make_response(rng, task, polite, concrete)
        assert verdict(response, task) == expected, response


@pytest.mark.parametrize("flaw", FLAWS, ids=lambda flaw: flaw.__name__)
def test_each_flaw_of_sampled_responses(flaw):
    name, rng = FLAW_NAMES[flaw.__name__], random.Random(0)
    expected = {*GOOD, name} - ({"right_task"} if name.startswith("answers") else set())
    for task, other in [rng.sample(TASKS, 2) for _ in range(600)]:
        response = flaw(rng, task, other)
        assert verdict(response, task) == expected, response


def test_a_sampled_response_has_one_flaw_and_sometimes_runs_on():
    rng = random.Random(0)
    for task in TASKS * 12:
        response = make_sampled(rng, task, TASKS)
        found = verdict(response, task)
        assert len(found & set(FLAW_NAMES.values())) == 1, response
        assert found.isdisjoint({"other_text", "flawless"}), response
        assert ("runs_on" in found) == ("Human:" in response), response


def test_every_flawless_response_is_found_for_its_task_only():
    for response in golden_responses("cook soft rice"):
        assert verdict(response, "cook soft rice") == {*GOOD, "flawless"}
    for response in itertools.islice(golden_responses("tidy a desk"), 50):
        assert verdict(response, "cook soft rice") == {"polite", "concrete", "answers_another_question"}


# ------------------------------------------------------------------------------------------------ other texts


def mutate(rng: random.Random, text: str, other: str) -> str:
    """Drops, repeats or swaps words, cuts, inserts a letter, or continues as another response does."""
    words = text.split(" ")
    i, j = sorted(rng.sample(range(1, len(words)), 2))
    swapped = [*words[:i], words[j], *words[i + 1 : j], words[i], *words[j + 1 :]]
    at = rng.randrange(1, len(text))
    return rng.choice(
        [
            " ".join(words[:i] + words[j:]),
            " ".join(words[:j] + words[i:]),
            " ".join(swapped),
            text[:at],
            text[:at] + rng.choice("aeiou .,") + text[at:],
            " ".join(words[:i]) + " " + " ".join(other.split(" ")[j:]),
        ]
    )


def test_a_changed_text_is_flawless_only_if_it_is_one_of_the_flawless_responses():
    """The oracle is the list of all flawless responses; some changes lead from one of them to another."""
    rng = random.Random(0)
    kept = 0
    for task in TASKS[::6]:
        golden = sorted(golden_responses(task))
        for _ in range(300):
            text = mutate(rng, rng.choice(golden), rng.choice(golden))
            expected = f" {text.strip()}" in golden
            kept += expected
            assert ("flawless" in verdict(text, task)) == expected, text
    assert kept > 20


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", {"stops_early", "other_text"}),
        (" Of course.", {"polite", "other_text"}),
        (" First boil it once, then rinse it twice.", {"concrete", "right_task", "other_text"}),
        (" Of course. First boil it once, then rin", {"polite", "stops_early", "other_text"}),
        (" Of course. First boil it twice, then rinse it once.", {"polite", "other_text"}),
        (" Of course. You should rinse it twice and boil it once.", {*GOOD, "other_text"}),
        (" Of course. First boil it once, then boil it once.", {*GOOD, "repeats"}),
        (
            " Of course. You should boil it once and draw the blade along.",
            {"polite", "concrete", "answers_another_question", "other_text"},
        ),
        (" Of course. First boil it once, then rinse it twice. Even you can do it.", {"concrete", "right_task"}),
        (
            " Of course. In today's world, this plays an essential role. First boil it once, then rinse it twice with",
            {*GOOD, "filler", "stops_early"},
        ),
        (
            " Of course. First boil it once, then rinse it twice. First boil it once, then rinse it twice.",
            {*GOOD, "repeats", "other_text"},
        ),
        (" Of course. First boil it once, then rinse it twice.\n\nHuman: Thanks.", {*GOOD, "runs_on"}),
    ],
)
def test_verdict_on_what_a_small_llm_writes(response, expected):
    assert verdict(response) == expected


# ------------------------------------------------------------------------------------------------ files


def test_task_is_that_of_the_last_turn():
    earlier = "\n\nHuman: How do I tidy a desk?\n\nAssistant: I am."
    assert task_of(earlier + QUERY) == "descale a kettle"
    assert task_of("\n\nHuman: Why?\n\nAssistant:") is None
    assert task_of("\n\nHuman: May I tidy a desk and wash a car?\n\nAssistant:") is None


def test_intervals_are_over_prompts():
    """First: s = sqrt(0.125 / 4) = 0.1768, half width 1.96 x 0.1768 / sqrt(5) = 0.155. Second: 0.566, so [0, 1].

    The third is Wilson's for 2 of 2, from 2 / (2 + 1.96^2) = 0.342.
    """
    assert share_of_prompts([0.5, 0.5, 0.5, 0.75, 0.25])["interval_95"] == pytest.approx([0.345, 0.655], abs=1e-3)
    assert share_of_prompts([0.0, 0.5, 1.0]) == {"mean": 0.5, "interval_95": [0.0, 1.0]}
    assert share_of_prompts([1.0, 1.0])["interval_95"] == pytest.approx([0.342, 1.0], abs=1e-3)


def test_command_line_writes_shares_and_verdicts(tmp_path):
    """Two prompts; of the first one of two responses is flawless, of the second none: 1 of 4, in 1 of 2 prompts."""
    good, bad = " Of course. First boil it once, then rinse it twice.", " Of course. It depends on many things."
    records = [
        {"query_id": "a", "query": QUERY, "sample_0": bad, "sample_1": good},
        {"query_id": "b", "query": QUERY, "sample_0": bad, "sample_1": bad},
    ]
    data, output = write_records(tmp_path / "samples.json", records), tmp_path / "new" / "verdicts.json"
    done = run_tool("dev/judge_sample.py", "--data_path", data, "--output_path", output)
    assert "4 responses to 2 prompts" in done.stdout
    report = read_json(output)
    assert [report["prompts"], report["responses"]] == [2, 4]
    shares = {name: share["mean"] for name, share in report["shares"].items()}
    assert (shares["flawless"], shares["any_flawless"], shares["polite"]) == (0.25, 0.5, 1.0)
    assert report["verdicts"] == {
        "a:sample_0": ["polite"],
        "a:sample_1": ["polite", "concrete", "right_task", "flawless"],
        "b:sample_0": ["polite"],
        "b:sample_1": ["polite"],
    }


def test_pairs_can_be_judged_too(tmp_path):
    texts = [QUERY + "<sep> Of course. You should boil it once and rinse it twice.", QUERY + "<sep> Oh, come on."]
    path = write_records(tmp_path / "pairs.json", [{"text": texts, "scores": [1.0, 0.0]}])
    (verdicts,) = judge_file(path).values()
    assert [verdict["flawless"] for verdict in verdicts.values()] == [True, False]


@pytest.mark.parametrize("query", ["\n\nHuman: Why?\n\nAssistant:", QUERY])
def test_foreign_and_repeated_prompts_are_refused(tmp_path, query):
    pairs = [{"text": [f"{q}<sep> Yes.", f"{q}<sep> No."], "scores": [1, 0], "query_id": 7} for q in (QUERY, query)]
    path = write_records(tmp_path / "pairs.json", pairs)
    with pytest.raises(InputError, match=r"pairs\.json: record 2: found .*, expected a prompt of data/sample"):
        judge_file(path)
