"""The committed sample data: reproducible, in the right formats, and without a prompt in two splits."""

import json
from pathlib import Path

import pytest

from apo.cli import write_json
from apo.records import load_preference_data
from tools.dev.make_sample_data import LABEL_NOISE, TEST_PROMPTS, TEXTS, make_sample_data

SAMPLE_DIR = Path(__file__).resolve().parents[3] / "data" / "sample"
GAME = ("llm_data/game_prompts.train.json", "eval_data/game_golden.test.json", "llm_data/game_sft.train.json")
TRAIN = ("rm_data/hh_split_rm.train.json", "llm_data/hh_split_llm.train.json")
VALID, TEST = "eval_data/hh_split_llm.valid.json", "eval_data/hh_cleaned_origin.test.json"
PAIR_FILES = (*TRAIN, "hh_cleaned_origin.train.json", VALID, TEST)
GOLDEN_AND_SAMPLES = {
    "rm_data/hh_split_rm.golden.json": "rm_data/hh_split_rm_llm_v0.sample.json",
    "eval_data/hh_split_llm_valid.golden.json": "eval_data/hh_split_llm_valid_llm_v0.sample.json",
    "eval_data/hh_cleaned_origin_test.golden.json": "eval_data/hh_cleaned_origin_test_llm_v0.sample.json",
}


def load(name: str) -> list[dict]:
    return json.loads((SAMPLE_DIR / name).read_text(encoding="utf-8"))


def queries(name: str) -> list[str]:
    """The prompt of every record, pair or not."""
    return [record["query"] if "query" in record else record["text"][0].split("<sep>")[0] for record in load(name)]


def mentioned_tasks(name: str) -> set[str]:
    return {task for task in TEXTS["tasks"] for query in queries(name) if task in query}


def test_committed_files_are_those_of_seed_42(tmp_path):
    files = make_sample_data(42)
    assert {path.relative_to(SAMPLE_DIR).as_posix() for path in SAMPLE_DIR.rglob("*.json")} >= set(files)
    for name, records in files.items():
        write_json(tmp_path / name, records)
        assert (tmp_path / name).read_bytes() == (SAMPLE_DIR / name).read_bytes(), name


def test_another_seed_gives_other_texts():
    assert make_sample_data(1) != make_sample_data(2)


@pytest.mark.parametrize("name", PAIR_FILES)
def test_pair_files_are_valid_training_data(name):
    records = load_preference_data(SAMPLE_DIR / name, "comparison_pair", add_sep_token=True)
    assert len(records) == len(set(queries(name)))


def test_no_prompt_and_no_task_is_in_two_splits():
    splits = [mentioned_tasks(TRAIN[0]) | mentioned_tasks(TRAIN[1]), mentioned_tasks(VALID), mentioned_tasks(TEST)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == len(TEXTS["tasks"])
    all_queries = [query for name in (*TRAIN, VALID, TEST) for query in queries(name)]
    assert len(all_queries) == len(set(all_queries))


def test_game_prompts_are_about_tasks_of_training_in_new_words():
    """A question and its situation, the last turn, are new; an earlier exchange before it does not make them so."""
    turns = [{query.rpartition("Human:")[2] for query in queries(name)} for name in (*GAME, *TRAIN)]
    assert sum(map(len, turns)) == len(set.union(*turns)) == sum(len(load(name)) for name in (*GAME, *TRAIN))
    assert set.union(*map(mentioned_tasks, GAME)) == set.union(*map(mentioned_tasks, TRAIN))


def test_cleaned_training_file_is_the_rm_and_the_llm_part():
    assert load("hh_cleaned_origin.train.json") == load(TRAIN[0]) + load(TRAIN[1])


@pytest.mark.parametrize(("golden", "samples"), GOLDEN_AND_SAMPLES.items())
def test_golden_and_sampled_responses_are_for_the_same_prompts(golden, samples):
    pair_file = {"rm_data": TRAIN[0], "eval_data": VALID if "valid" in golden else TEST}[golden.split("/")[0]]
    ids = [record["query_id"] for record in load(golden)]
    assert ids == [record["query_id"] for record in load(samples)]
    assert queries(golden) == queries(samples) == queries(pair_file)[: len(ids)]
    keys = ["query_id", "query", "sample_0", "sample_1", "sample_2", "sample_3"]
    assert all(list(record) == keys for record in load(samples))


def test_a_tenth_of_the_human_labels_is_wrong():
    """A pair has a wrong label if its chosen response is less polite and concrete than the rejected one."""

    def quality(text: str) -> int:
        response = text.split("<sep> ")[1]
        polite = response.startswith(tuple(TEXTS["polite_openers"]))
        return polite + (not any(phrase in response for phrase in TEXTS["empty_talk"]))

    wrong = sum(quality(record["text"][0]) < quality(record["text"][1]) for record in load(TEST))
    assert wrong == round(LABEL_NOISE * TEST_PROMPTS)


def sampled_responses(name: str) -> list[str]:
    return [text for record in load(name) for text in list(record.values())[2:]]


def test_flaws_of_sampled_responses_are_in_no_human_pair():
    human = [
        text.split("<sep>")[1] for name in (*TRAIN, VALID, TEST) for record in load(name) for text in record["text"]
    ]
    sampled = [text for name in GOLDEN_AND_SAMPLES.values() for text in sampled_responses(name)]
    for flaw in (
        lambda text: not text.endswith((".", "?")),
        lambda text: any(phrase in text for phrase in TEXTS["filler"]),
    ):
        assert not any(map(flaw, human))
        assert sum(map(flaw, sampled)) > len(sampled) / 10


def test_golden_and_sampled_responses_do_not_differ_in_manner():
    """Openers, by which good and bad human responses differ, are polite in both."""
    polite = tuple(TEXTS["polite_openers"])
    for golden, samples in GOLDEN_AND_SAMPLES.items():
        texts = [record["golden"] for record in load(golden)] + sampled_responses(samples)
        assert all(text.strip().startswith(polite) for text in texts)
