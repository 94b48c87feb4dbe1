"""Selection: the choice by rewards, the best-of-n estimator, and files that belong together."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import write_records
from hypothesis import given, settings
from hypothesis import strategies as st

from apo.cli import InputError
from apo.resume import model_version
from apo.selection import (
    ScoredPrompt,
    best_of_n,
    check_origin,
    find_score_file,
    load_scored_prompts,
    share_of_ties,
    to_pairs,
    to_text_scores,
)
from apo.statistics import best_of_weights, expected_best, mean_and_interval

QUERY = "\n\nHuman: Why?\n\nAssistant:"


def sampled(query_id: int | str, *responses: str) -> dict:
    return {"query_id": query_id, "query": QUERY, **{f"sample_{i}": text for i, text in enumerate(responses)}}


def scored(*pairs: tuple[str, float], query_id: str = "1", query: str = QUERY) -> ScoredPrompt:
    """A prompt with (response, reward) pairs."""
    responses = {f"sample_{i}": response for i, (response, _) in enumerate(pairs)}
    rewards = {f"sample_{i}": reward for i, (_, reward) in enumerate(pairs)}
    return ScoredPrompt({"query_id": query_id, "query": query, **responses}, query_id, query, responses, rewards)


def load(tmp_path: Path, records: list[dict], rewards: list[dict], response_keys: tuple = ()) -> list[ScoredPrompt]:
    data = write_records(tmp_path / "samples.json", records)
    return load_scored_prompts(data, write_records(tmp_path / "rewards.json", rewards), response_keys)


# ------------------------------------------------------------------------------------------------ choosing


def test_best_response_is_the_first_nonempty_one_with_the_largest_reward():
    """Rewards 5, 1, 2, 2, 0: the response with 5 is white space; of the two with 2 the first is taken."""
    prompt = scored((" \n", 5.0), (" a", 1.0), (" b", 2.0), (" c", 2.0), (" d", 0.0))
    assert prompt.candidates == ["sample_2", "sample_3", "sample_1", "sample_4"]


def test_pair_is_best_over_worst_of_the_trainable_responses():
    """Not used are an empty response, the one with the largest reward, which holds <sep>, and four prompts."""
    prompts = [
        scored(("", -9.0), (" a", 1.0), (" b", 3.0), (" c<sep>", 7.0), (" d", -1.0), query_id="x:1"),
        scored((" a", 1.0), ("", 2.0)),
        scored((" a", 1.0), (" b", 1.0)),
        scored((" a", 1.0), (" a ", 1.1)),
        scored((" a", 1.0), (" b", 2.0), query="with <sep>"),
    ]
    assert to_pairs(prompts) == [{"prompt": QUERY, "chosen": " b", "rejected": " d", "query_id": "x:1"}]
    items = to_text_scores(prompts)
    assert items[0] == {
        "text": [f"{QUERY}<sep> {letter}" for letter in "abd"],
        "scores": [1.0, 3.0, -1.0],
        "query_id": "x:1",
    }
    assert [item["scores"] for item in items[1:]] == [[1.0, 1.0], [1.0, 1.1]]


# ------------------------------------------------------------------------------------------------ best of n


def test_expected_best_by_hand():
    """Of 4, 1, 2 sorted 1, 2, 4: n = 1 the mean 7/3; n = 2 the pairs (1,2), (1,4), (2,4) have 2, 4, 4, mean 10/3;
    n = 3 the largest, 4. The weights of n = 2 are 0, 1/3, 2/3.
    """
    assert expected_best([4.0, 1.0, 2.0]) == pytest.approx([7 / 3, 10 / 3, 4])
    np.testing.assert_allclose(best_of_weights(3)[1], [0, 1 / 3, 2 / 3])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8))
def test_expected_best_is_the_mean_over_all_subsets(rewards):
    brute = [
        np.mean([max(subset) for subset in itertools.combinations(rewards, n)]) for n in range(1, len(rewards) + 1)
    ]
    assert expected_best(rewards) == pytest.approx(brute, abs=1e-9)


def test_expected_best_is_unbiased():
    """Four independent responses, each 0 or 1 with probability 1/2: the best of n is 1 - 2^-n on average. Over all 16
    outcomes the mean of the estimate is exactly that.
    """
    outcomes = [expected_best(map(float, outcome)) for outcome in itertools.product((0, 1), repeat=4)]
    assert np.mean(outcomes, axis=0) == pytest.approx([1 / 2, 3 / 4, 7 / 8, 15 / 16])


@pytest.mark.parametrize("num_responses", [1, 2, 5, 1000])
def test_weights_of_each_n_sum_to_one(num_responses):
    np.testing.assert_allclose(best_of_weights(num_responses).sum(axis=1), 1, rtol=1e-12)


def test_interval_by_hand():
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, s^2 = 14 / 2 = 7, half = 1.96 sqrt(7 / 3) = 2.9939."""
    found = mean_and_interval(np.array([1.0, 2.0, 6.0]))
    assert found["mean"] == 3
    assert found["interval_95"] == pytest.approx([3 - 2.9939, 3 + 2.9939], abs=1e-3)
    assert mean_and_interval(np.array([4.0])) == {"mean": 4.0, "interval_95": None}


def test_best_of_n_averages_over_the_prompts_with_n_responses():
    """Prompt A has rewards 1, 3 and an empty response, prompt B 0, 0, 6.

    n = 1: (2 + 2) / 2 = 2. n = 2: A 3; B (0,0), (0,6), (0,6): 4; mean 3.5. n = 3: B alone, 6.
    """
    rows = best_of_n([scored((" a", 1.0), ("", 9.0), (" b", 3.0)), scored((" a", 0.0), (" b", 0.0), (" c", 6.0))])
    assert [(row["n"], row["prompts"]) for row in rows] == [(1, 2), (2, 2), (3, 1)]
    assert [row["mean"] for row in rows] == pytest.approx([2, 3.5, 6])
    assert rows[2]["interval_95"] is None


def test_ties_are_those_for_the_best():
    """Two of four prompts."""
    prompts = [
        scored((" abc", 2.0), (" d", 1.0)),
        scored((" ab", 2.0), (" cd", 2.0), (" e", 0.0)),
        scored((" a", 1.0), (" b", 1.0)),
        scored((" ab", 1.0), (" cdefghij", 0.0)),
    ]
    assert share_of_ties(prompts) == 0.5


# ------------------------------------------------------------------------------------------------ loading


def test_ids_may_hold_colons_and_any_character(tmp_path):
    """A reward is named "<id>:<response key>"; the id ends at the last colon."""
    ids = ["a:b", "a", "a:sample_0", "问题:1", "🙂\n:", "http://x/y:80"]
    records = [{"query_id": i, "query": QUERY, "sample_0": " x", "my_gpt4": " y", "ans_1": " z"} for i in ids]
    rewards = [{f"{i}:{key}": n} for n, i in enumerate(ids) for key in ("sample_0", "my_gpt4", "ans_1")]
    prompts = load(tmp_path, records, rewards, ["my_gpt4"])
    assert [set(prompt.rewards.values()) for prompt in prompts] == [{float(n)} for n in range(len(ids))]
    assert list(prompts[0].rewards) == ["sample_0", "my_gpt4", "ans_1"]


def test_score_file_may_be_given_by_its_folder_and_suffix(tmp_path):
    data, folder = tmp_path / "samples.jsonl.gz", tmp_path / "scores"
    base = write_records(folder / "samples_pred_base_results.json", [])
    write_records(folder / "others_pred_base_results.json", [])
    assert find_score_file(data, folder, None) == base
    apo = write_records(folder / "samples_pred_apo_results.json", [])
    assert find_score_file(data, folder, "apo") == apo
    assert find_score_file(data, base, None) == base
    for suffix, message in (
        (None, "found samples_pred_apo_results.json; samples_pred_base_results.json, expected one"),
        ("*", r"found none, expected one samples_pred_\*_results.json; see --rm_scorer"),
    ):
        with pytest.raises(InputError, match=message):
            find_score_file(data, folder, suffix)


@pytest.mark.parametrize(
    ("records", "rewards", "message"),
    [
        (
            [sampled(i, " a", " b") for i in "abcdefg"],
            [{"a:sample_0": 1, "a:sample_1": 1, "b:sample_1": 1}],
            r"not the rewards of .*samples.json: found no reward named b:sample_0; c:sample_0; c:sample_1; "
            r"d:sample_0; d:sample_1; and 6 more; give the file that train.py",
        ),
        (
            [sampled("a", " a")],
            [{"a:sample_0": 1, "a:sample_1": 1, "z:1:sample_0": 1, "none": 1}],
            "found no response named a:sample_1; none; z:1:sample_0; give",
        ),
        (
            [sampled("a", " a")],
            [{"b:sample_0": 1}],
            "found no reward named a:sample_0; give",
        ),
    ],
)
def test_rewards_of_other_data_are_refused_with_ids_and_counts(tmp_path, records, rewards, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, records, rewards)


@pytest.mark.parametrize(
    ("changed", "name"),
    [("samples.json", "data_sha256"), ("rewards.json", "result_sha256"), ("rm/model.safetensors", "model")],
)
def test_rewards_of_what_was_changed_since_are_refused_unless_allowed(tmp_path, caplog, changed, name):
    paths = data, rewards, _ = [tmp_path / part for part in ("samples.json", "rewards.json", "rm/model.safetensors")]
    for path in paths:
        write_records(path, [])
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (data, rewards)]
    recorded = {"data_sha256": hashes[0], "result_sha256": hashes[1]}
    recorded |= {"model_name_or_path": str(tmp_path / "rm"), "model": model_version(str(tmp_path / "rm"), None)}
    write_records(tmp_path / "rewards.settings.json", recorded)
    assert check_origin(data, rewards, False).items() <= recorded.items() and caplog.text == ""
    write_records(tmp_path / changed, [0])
    with pytest.raises(InputError, match=f"not the rewards of .*: {name} is .*, or accept it with --allow_changes"):
        check_origin(data, rewards, False)
    check_origin(data, rewards, True)
    assert f"not the rewards of {data} as it is now: {name} is" in caplog.text


@pytest.mark.parametrize("settings_file", [None, "[]", "{", "{}"])
def test_rewards_without_a_record_are_a_warning(tmp_path, caplog, settings_file):
    for name in ("samples.json", "rewards.json"):
        write_records(tmp_path / name, [])
    if settings_file is not None:
        (tmp_path / "rewards.settings.json").write_text(settings_file)
    check_origin(tmp_path / "samples.json", tmp_path / "rewards.json", False)
    assert "rewards.json: no settings file records of which data these are the rewards" in caplog.text
