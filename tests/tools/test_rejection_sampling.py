"""Rejection sampling: the reference's choice exactly, the best-of-n estimator, files that belong together."""

import gzip
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import E2E, read_json, run_tool, write_records
from hypothesis import given, settings
from hypothesis import strategies as st

from apo.cli import InputError
from apo.records import load_preference_data
from tools.rejection_sampling import (
    ScoredPrompt,
    best_of_n,
    best_of_weights,
    expected_best,
    find_score_file,
    load_scored_prompts,
    make_report,
    mean_and_interval,
    name_outputs,
    to_pairs,
    to_text_scores,
    with_target,
)

TOOL = "rejection_sampling.py"
REFERENCE = read_json(E2E / "reference.json")
QUERY = "\n\nHuman: Why?\n\nAssistant:"


def sampled(query_id: int | str, *answers: str, query: str = QUERY) -> dict:
    return {"query_id": query_id, "query": query, **{f"sample_{i}": answer for i, answer in enumerate(answers)}}


def scored(*pairs: tuple[str, float], query_id: str = "1", query: str = QUERY) -> ScoredPrompt:
    """A prompt with (answer, reward) pairs."""
    answers = {f"sample_{i}": answer for i, (answer, _) in enumerate(pairs)}
    rewards = {f"sample_{i}": reward for i, (_, reward) in enumerate(pairs)}
    return ScoredPrompt({"query_id": query_id, "query": query, **answers}, query_id, query, answers, rewards)


def rewards_of(*rewards: float) -> ScoredPrompt:
    return scored(*((f" Answer {i}.", reward) for i, reward in enumerate(rewards)))


@pytest.fixture
def files(tmp_path):
    """Writes samples and rewards as `train.py` names them, returns their paths."""

    def write(records: list[dict], rewards: list[dict]) -> tuple[Path, Path]:
        data = write_records(tmp_path / "samples.json", records)
        return data, write_records(tmp_path / "scores" / "samples_pred_rm_results.json", rewards)

    return write


# ------------------------------------------------------------------------------------------------ the reference


def test_command_line_chooses_what_the_reference_chose(files, tmp_path):
    """The recorded entries hold id and target only; records keep their fields and gain "target" and "scores"."""
    data, rewards = files(read_json(E2E / "samples.json"), REFERENCE["inference"]["scores"])
    flags = [
        "--data_path",
        data,
        "--score_path",
        rewards,
        "--rm_scorer",
        "rm",
        "--output_dir",
        tmp_path / "new" / "out",
    ]
    done = run_tool(TOOL, *flags, "--output_file_name", "best.json", "--to_pairs")
    assert done.stderr == f"WARNING: --rm_scorer rm has no effect: --score_path {rewards} is no folder\n"
    folder = tmp_path / "new" / "out"
    records = read_json(folder / "best.json")
    assert [{k: r[k] for k in ("query_id", "target")} for r in records] == REFERENCE["rejection_sampling"]
    assert [{k: v for k, v in r.items() if k not in ("target", "scores")} for r in records] == read_json(data)
    assert [list(r)[-2:] for r in records] == [["target", "scores"]] * len(records)
    flat = [{f"{r['query_id']}:{key}": reward} for r in records for key, reward in r["scores"].items()]
    assert flat == REFERENCE["inference"]["scores"]

    names = {"best.json", "best_report.json", "best_report.png", "best_pairs.json", "best_text_scores.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "best_report.png").read_bytes().startswith(b"\x89PNG")
    assert [row["n"] for row in read_json(folder / "best_report.json")["best_of_n"]] == [1, 2, 3, 4]
    assert "best of 4: expected reward -0.0072 [-1.0952, 1.0808], 14 prompts" in done.stdout
    for name in ("best_pairs.json", "best_text_scores.json"):
        assert len(load_preference_data(folder / name, "comparison_pair", add_sep_token=True)) == 14

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run_tool(TOOL, *flags, "--output_file_name", "best.json", "--to_pairs")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_outputs_are_named_as_in_the_reference():
    """Without a name, after the rewards; a name with a folder is a path of its own; pairs only where asked for."""
    scores = Path("scores/s_pred_rm_results.json")
    assert name_outputs(Path("out"), None, scores, False)["target"] == Path("out/s_pred_rm_results.json_sft.json")
    assert name_outputs(Path("out"), "a/b.json", scores, True) == {
        "target": Path("a/b.json"),
        "report": Path("a/b_report.json"),
        "figure": Path("a/b_report.png"),
        "pairs": Path("a/b_pairs.json"),
        "text_scores": Path("a/b_text_scores.json"),
    }


# ------------------------------------------------------------------------------------------------ choosing


def test_best_answer_is_the_first_with_the_largest_reward_that_says_something():
    """Rewards 5 (empty), 1, 2, 2, 0: the 5 belongs to white space, of the two 2s the first is taken."""
    prompt = scored((" \n", 5.0), (" a", 1.0), (" b", 2.0), (" c", 2.0), (" d", 0.0))
    assert prompt.candidates == ["sample_2", "sample_3", "sample_1", "sample_4"]
    record = with_target(prompt)
    assert record["target"] == " b"
    assert record["scores"] == {"sample_0": 5.0, "sample_1": 1.0, "sample_2": 2.0, "sample_3": 2.0, "sample_4": 0.0}


def test_pair_is_best_over_worst_of_what_can_be_trained_on():
    """Out of it: the empty answer, the largest reward of all, whose text holds <sep>, and four prompts."""
    prompts = [
        scored(("", -9.0), (" a", 1.0), (" b", 3.0), (" c<sep>", 7.0), (" d", -1.0), query_id="x:1"),
        scored((" a", 1.0), ("", 2.0)),
        scored((" a", 1.0), (" b", 1.0)),
        scored((" a", 1.0), (" a ", 1.1)),
        scored((" a", 1.0), (" b", 2.0), query="with <sep>"),
    ]
    skipped: Counter[str] = Counter()
    assert to_pairs(prompts, skipped) == [{"prompt": QUERY, "chosen": " b", "rejected": " d", "query_id": "x:1"}]
    assert skipped == {"fewer than two answers": 2, "equal rewards": 1, "equal answers": 1}
    items = to_text_scores(prompts)
    assert items[0] == {
        "text": [f"{QUERY}<sep> {letter}" for letter in "abd"],
        "scores": [1.0, 3.0, -1.0],
        "query_id": "x:1",
    }
    assert [item["scores"] for item in items[1:]] == [[1.0, 1.0], [1.0, 1.1]]


def test_prompt_without_an_answer_is_left_out_counted_and_named(files, tmp_path):
    data, rewards = files(
        [sampled("q:0", " ", "\n"), sampled("q:1", " a", " b")],
        [{"q:0:sample_0": 1}, {"q:0:sample_1": 2}, {"q:1:sample_0": 1}, {"q:1:sample_1": 1}],
    )
    done = run_tool(TOOL, "--data_path", data, "--score_path", rewards, "--output_dir", tmp_path, "--to_pairs")
    assert done.stderr == 'WARNING: left out, all answers are empty: 1 id: "q:0"\n'
    stem = "samples_pred_rm_results.json_sft"
    assert [record["target"] for record in read_json(tmp_path / f"{stem}.json")] == [" a"]
    assert "0 pairs of best over worst, 1 prompts (1 equal rewards) without one" in done.stdout
    report = read_json(tmp_path / f"{stem}_report.json")
    assert report["prompts_left_out"] == ["q:0"]
    assert (report["prompts"], report["ties"], report["pairs"], report["length"]["chosen"]) == (1, 1.0, 0, {})
    assert report["prompts_without_pair"] == {"equal rewards": 1}
    assert read_json(tmp_path / f"{stem}_pairs.json") == []


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
    """Four independent answers, each 0 or 1 with probability 1/2: the best of n is 1 - 2^-n on average. Over all 16
    outcomes the mean of the estimate is exactly that.
    """
    outcomes = [expected_best(map(float, outcome)) for outcome in itertools.product((0, 1), repeat=4)]
    assert np.mean(outcomes, axis=0) == pytest.approx([1 / 2, 3 / 4, 7 / 8, 15 / 16])


@pytest.mark.parametrize("num_answers", [1, 2, 5, 1000])
def test_weights_of_each_n_sum_to_one(num_answers):
    np.testing.assert_allclose(best_of_weights(num_answers).sum(axis=1), 1, rtol=1e-12)


def test_interval_by_hand():
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, s^2 = 14 / 2 = 7, half = 1.96 sqrt(7 / 3) = 2.9939."""
    found = mean_and_interval(np.array([1.0, 2.0, 6.0]))
    assert found["mean"] == 3
    assert found["interval_95"] == pytest.approx([3 - 2.9939, 3 + 2.9939], abs=1e-3)
    assert mean_and_interval(np.array([4.0])) == {"mean": 4.0, "interval_95": None}


def test_best_of_n_averages_over_the_prompts_that_have_n_answers():
    """Prompt A has rewards 1, 3 and an empty answer, prompt B 0, 0, 6.

    n = 1: (2 + 2) / 2 = 2. n = 2: A 3; B (0,0), (0,6), (0,6): 4; mean 3.5, gain (1 + 2) / 2.
    n = 3: B alone, 6, gain 4.
    """
    rows = best_of_n([scored((" a", 1.0), ("", 9.0), (" b", 3.0)), rewards_of(0.0, 0.0, 6.0)])
    assert [(row["n"], row["prompts"]) for row in rows] == [(1, 2), (2, 2), (3, 1)]
    assert [row["mean"] for row in rows] == pytest.approx([2, 3.5, 6])
    assert [row["gain"] for row in rows] == pytest.approx([0, 1.5, 4])
    assert rows[2]["interval_95"] is None


def test_report_counts_ties_for_the_best_and_lengths_in_characters():
    """Two of four prompts tie for the best; chosen 4, 3 and 3 characters, rejected 2, 2 and 9."""
    prompts = [
        scored((" abc", 2.0), (" d", 1.0)),
        scored((" ab", 2.0), (" cd", 2.0), (" e", 0.0)),
        scored((" a", 1.0), (" b", 1.0)),
        scored((" ab", 1.0), (" cdefghij", 0.0)),
    ]
    report = make_report(prompts, to_pairs(prompts, Counter()))
    assert (report["prompts"], report["ties"], report["pairs"]) == (4, 0.5, 3)
    assert report["length"] == {
        "chosen": {"mean": pytest.approx(10 / 3), "median": 3.0},
        "rejected": {"mean": pytest.approx(13 / 3), "median": 2.0},
    }


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_json_lines_and_gzip_are_read(tmp_path, ending):
    records, rewards = (
        [sampled(1, " a", " b"), sampled(2, " c")],
        [{"1:sample_0": 1, "1:sample_1": 2}, {"2:sample_0": 0}],
    )
    paths = tmp_path / f"samples{ending}", tmp_path / f"samples_pred_rm_results{ending}"
    for path, items in zip(paths, (records, rewards), strict=True):
        text = "\n".join(map(json.dumps, items)) if "jsonl" in ending else json.dumps(items)
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    assert [with_target(prompt)["target"] for prompt in load_scored_prompts(*paths)] == [" b", " c"]


def test_ids_with_colons_and_any_character(files):
    """The score key is "<id>:<answer key>" and the id ends at its last colon."""
    ids = ["a:b", "a", "a:sample_0", "问题:1", "🙂\n:", "http://x/y:80"]
    records = [{"query_id": i, "query": QUERY, "sample_0": " x", "my_gpt4": " y", "ans_b": " z"} for i in ids]
    rewards = [{f"{i}:{key}": n} for n, i in enumerate(ids) for key in ("sample_0", "my_gpt4", "ans_b")]
    prompts = load_scored_prompts(*files(records, rewards))
    assert [set(prompt.rewards.values()) for prompt in prompts] == [{float(n)} for n in range(len(ids))]
    assert list(prompts[0].rewards) == ["sample_0", "my_gpt4", "ans_b"]


def test_score_file_may_be_given_by_its_folder_and_suffix(tmp_path):
    data, folder = tmp_path / "samples.jsonl.gz", tmp_path / "scores"
    base = write_records(folder / "samples_pred_base_results.json", [])
    write_records(folder / "others_pred_base_results.json", [])
    assert find_score_file(data, folder, None) == base
    apo = write_records(folder / "samples_pred_apo_results.json", [])
    assert find_score_file(data, folder, "apo") == apo
    assert find_score_file(data, base, None) == base
    assert find_score_file(folder / "samples.json", None, "apo") == apo
    for score_path, suffix, message in (
        (folder, None, r"found 2 \(samples_pred_apo_results.json; samples_pred_base_results.json\), expected one"),
        (folder, "*", r"found none, expected one samples_pred_\*_results.json; name the suffix by --rm_scorer"),
        (None, "apo", f"{tmp_path}: found none, expected one samples_pred_apo_results.json"),
        (None, None, "found neither --score_path nor --rm_scorer"),
    ):
        with pytest.raises(InputError, match=message):
            find_score_file(data, score_path, suffix)


@pytest.mark.parametrize(
    ("records", "rewards", "message"),
    [
        (
            [sampled(i, " a", " b") for i in "abcdefg"],
            [{"a:sample_0": 1, "a:sample_1": 1, "b:sample_1": 1}],
            r'not the rewards of .*samples.json: 11 of 14 answers have no reward, those of 6 ids: "b"; "c"; "d"; "e"; '
            r'"f"; and 1 more; give the file that train.py',
        ),
        (
            [sampled("a", " a")],
            [{"a:sample_0": 1, "a:sample_1": 1, "z:1:sample_0": 1, "none": 1}],
            r'3 of 4 rewards have no answer, those of 3 ids: "a"; "none"; "z:1"; give',
        ),
        (
            [sampled("a", " a")],
            [{"b:sample_0": 1}],
            r'1 of 1 answers have no reward, those of 1 id: "a"; 1 of 1 rewards have no answer, those of 1 id: "b"',
        ),
        (
            [sampled("a", " a"), sampled(1, " b"), sampled("1", " c"), sampled("a", " d")],
            [{"a:sample_0": 1}],
            r'samples.json: found more than one record of 2 ids: "a"; "1"; expected an id of its own each',
        ),
        (
            [sampled("a", " a")],
            [{"a:sample_0": 1}, {"a:sample_0": 1}],
            r"record 2: \"a:sample_0\": found a second rew",
        ),
        ([sampled("a", " a")], [{"a:sample_0": math.nan}], r"found the number nan, expected a finite reward"),
        ([sampled("a", " a")], [{"a:sample_0": 10**400}], r"found the number 10+, expected a finite reward"),
        ([sampled("a", " a")], [{"a:sample_0": "1"}], r'found the string "1", expected a finite reward'),
        ([sampled("a", " a")], [{"a:sample_0": True}], r"found true, expected a finite reward"),
        ([sampled("a")], [{"a:sample_0": 1}], r"record 1: field \"sample_0\": found no answer"),
        ([{**sampled("a"), "sample_0": None}], [{"a:sample_0": 1}], r"field \"sample_0\": found null, expected a str"),
    ],
)
def test_wrong_input_is_one_line_with_names_and_counts(files, records, rewards, message):
    with pytest.raises(InputError, match=message) as caught:
        load_scored_prompts(*files(records, rewards))
    assert "\n" not in str(caught.value)


def test_wrong_input_on_the_command_line_is_status_2_and_writes_nothing(files, tmp_path):
    data, rewards = files([sampled("a\nb", " ")], [{"a\nb:sample_0": 1}])
    out = tmp_path / "out"
    for extra, message in (
        (["--score_path", tmp_path / "absent.json"], "absent.json: no such file"),
        (["--score_path", rewards], "all answers of all 1 prompts are empty"),
        (["--score_path", write_records(tmp_path / "b.json", [{"b:sample_0": 1}])], r'1 id: "a\nb"'),
    ):
        done = run_tool(TOOL, "--data_path", data, "--output_dir", out, *extra, exit_status=2)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
        assert not out.exists()


def test_input_is_never_replaced_and_a_place_that_cannot_be_written_is_named(files, tmp_path):
    data, rewards = files([sampled("a", " a")], [{"a:sample_0": 1}])
    before = data.read_bytes()
    flags = ["--data_path", data, "--score_path", rewards]
    done = run_tool(TOOL, *flags, "--output_file_name", data, exit_status=2)
    assert data.read_bytes() == before
    assert f"{data}: found the data to read where the result goes" in done.stderr
    for place in (data / "out.json", rewards.parent):
        done = run_tool(TOOL, *flags, "--output_file_name", place, exit_status=2)
        assert f"error: {place}: cannot be written" in done.stderr and done.stderr.count("\n") == 1
