"""tools/check_data.py: every finding and statistic by hand, the counts of training, and the command line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import CHECKPOINT, REPO_ROOT, pair, read_json, run_tool, write_records

from apo.cli import InputError
from apo.records import load_preference_data
from apo.tokenizer import load_reward_tokenizer
from reward_datasets import tokenize_records
from tools import check_data
from tools.check_data import FileCheck, check_file, compare_files, format_file

SAMPLE = REPO_ROOT / "data" / "sample"


class WordTokenizer:
    """Every word is a token, so that lengths are easy to count."""

    bos_token_id, eos_token_id, pad_token_id, sep_token_id = 1, 2, 3, 4

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[self.ids.setdefault(word, 5 + len(self.ids)) for word in text.split()] for text in texts]


def golden(query_id: str, query: str = "Why?", response: str = " So.") -> dict:
    return {"query_id": query_id, "query": query, "golden": response}


def sampled(query_id: str, query: str = "Why?") -> dict:
    return {"query_id": query_id, "query": query, "sample_0": " No."}


def check(path: Path, role: str = "train", **settings: object) -> FileCheck:
    """Checks a file without a tokenizer."""
    return check_file(str(path), role, {"add_sep_token": False, **settings})


def check_tokens(path: Path, max_length: int, truncation_side: str = "left") -> FileCheck:
    """Checks a file with words as tokens."""
    settings = {"max_length": max_length, "truncation_side": truncation_side, "add_sep_token": True}
    return check_file(str(path), "train", settings, WordTokenizer())


def counts(findings: dict[str, list[str]]) -> dict[str, int]:
    return {name: len(cases) for name, cases in findings.items() if cases}


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs the tool in this process; returns its exit status, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        status = 0
        try:
            check_data.main()
        except SystemExit as error:
            status = error.code
        return (status, *capsys.readouterr())

    return run


# ------------------------------------------------------------------------------------------------ one file


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_records_after_a_bad_one_are_checked(tmp_path, name):
    """Records 2 (one score for two texts), 3 (an empty text) and 5 are bad, 4 is 1 again: two good records."""
    bad = [{**pair("What?"), "scores": [1.0]}, {"text": ["", "b<sep>c"], "scores": [1.0, 0.0]}]
    records = [pair(), *bad, pair(), 7]
    path, word = tmp_path / name, "line" if name == "a.jsonl" else "record"
    path.write_text("\n".join(map(json.dumps, records)) if word == "line" else json.dumps(records))
    found = check(path)
    assert (found.kind, found.counts["records"]) == ("comparison_pair", 2)
    assert counts(found.findings) == {"bad records": 3, "duplicates": 1}
    assert found.findings["duplicates"] == [f"{word} 4 is {word} 1 again"]
    with pytest.raises(InputError) as training:
        load_preference_data(path, "comparison_pair")
    assert str(training.value) == f"{path}: 3 bad records: {'; '.join(found.findings['bad records'])}"


def test_text_without_separator_is_bad_with_add_sep_token(tmp_path):
    path = write_records(tmp_path / "a.json", [{"text": ["a", "b"], "scores": [1, 0]}, pair()])
    assert counts(check(path, add_sep_token=True).findings) == {"bad records": 1}
    found = check(path)
    assert counts(found.findings) == {} and found.counts["no_prompt"] == 1


@pytest.mark.parametrize(
    ("content", "records", "message"),
    [
        ("", 0, "the file is empty or holds no records"),
        (json.dumps(pair()) + "\n{", 1, "broken JSON at line 2"),
    ],
)
def test_broken_file_is_a_finding(tmp_path, content, records, message):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    found = check(tmp_path / "a.json")
    assert found.counts["records"] == records and counts(found.findings) == {"unreadable": 1}
    assert found.findings["unreadable"][0].startswith(message)


def test_duplicates_have_the_same_prompt_and_set_of_responses(tmp_path):
    """2 is 1 with the other response preferred, 4 is 1 under another id: two duplicates; 3 has another prompt."""
    records = [pair(good=" a", bad=" b"), pair(good=" b", bad=" a"), pair("What?", " a", " b")]
    records.append(pair(good=" a", bad=" b", query_id="other"))
    found = check(write_records(tmp_path / "a.json", records))
    assert counts(found.findings) == {"duplicates": 2, "contradictions": 2}
    assert found.findings["duplicates"] == [
        "record 2 is record 1 again",
        "record 4 is record 1 again",
    ]
    expected = ["record 2 prefers the opposite of record 1", "record 4 prefers the opposite of record 2"]
    assert found.findings["contradictions"] == expected


def test_ids_must_be_unique_in_files_of_golden_and_sampled_responses_only(tmp_path):
    """Id "1" twice in each file, once as a number: one finding each, none among pairs."""
    files = {
        "golden": [golden("1"), golden(1, "What?")],
        "reject_sample": [sampled("1"), sampled(1, "What?")],
        "comparison_pair": [pair(query_id="1"), pair("What?", query_id="1")],
    }
    for kind, records in files.items():
        found = check(write_records(tmp_path / f"{kind}.json", records))
        assert found.kind == kind
        assert counts(found.findings) == ({} if kind == "comparison_pair" else {"repeated ids": 1})


def test_golden_responses_are_checked_as_by_the_converter(tmp_path):
    """Bad: no golden (2), a number (3), <sep> in the query (4). The converter skips an empty one."""
    records = [golden("1"), {"query_id": "2", "query": "a"}, golden("3", response=3), golden("4", "a<sep>")]
    found = check(write_records(tmp_path / "a.json", [*records, golden("5", "What?", " ")]))
    assert counts(found.findings) == {"bad records": 3}
    assert [text.split(":")[0] for text in found.findings["bad records"]] == [f"record {i}" for i in (2, 3, 4)]
    assert found.counts == {"records": 2, "responses": 2}


def test_identical_responses_are_found_where_one_is_preferred(tmp_path):
    """Of the group's pairs over the first response, one is of equal texts; 2 and 3 are equal too, but form no pair."""
    group = {"text": ["p<sep> a", "p<sep> b", "p<sep> b", "p<sep> a"], "scores": [1, 0, 0, 0]}
    found = check(write_records(tmp_path / "a.json", [pair(), group]))
    assert counts(found.findings) == {"pairs of equal texts": 1}
    assert found.findings["pairs of equal texts"] == ["record 2: responses 1 and 4"]


def test_first_five_of_many_findings_are_shown(tmp_path):
    """Records 2 to 8 are the first one again."""
    line = format_file(check(write_records(tmp_path / "a.json", [pair()] * 8)))[1]
    assert line.startswith("  FOUND 7 duplicates: record 2 is record 1 again; ")
    assert "record 6 is" in line and line.endswith("; and 2 more")


def test_ties_and_length_bias_by_hand(tmp_path):
    """Pairs: longer preferred, shorter preferred, equal length, a tie; a group of 3 pairs, one of them tied, the
    longer one preferred in the two others. So 5 pairs and 2 ties of 7, one tied item of 5, and the longer response is
    preferred in 3 of the 4 pairs of different lengths."""
    texts = [(" long", " a"), (" a", " long"), (" a", " b")]
    records = [pair(str(i), *responses) for i, responses in enumerate(texts)]
    records.append({"text": ["p<sep> a", "p<sep> bb"], "scores": [0.5, 0.5]})
    records.append({"text": ["q<sep> long", "q<sep> a", "q<sep> b"], "scores": [1, 0, 0]})
    found = check(write_records(tmp_path / "a.json", records))
    assert counts(found.findings) == {}
    assert (found.counts["pairs"], found.counts["tied_pairs"], found.counts["tied_items"]) == (5, 2, 1)
    assert (found.counts["longer_preferred"], found.counts["shorter_preferred"]) == (3, 1)


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        ("left", {"prompts cut away": 2, "pairs of equal tokens": 1}),
        ("right", {"pairs of equal tokens": 1}),
    ],
)
def test_truncation_by_hand(tmp_path, side, expected):
    """To 4 tokens. Record 1 has sequences bos p q sep a x y z eos and ... b x y z eos, of 9: on the left all but
    x y z eos is cut, which is the same for both and without prompt; on the right all but bos p q sep. Record 2 has
    bos p sep x eos and ... y eos, of 5, and loses one token."""
    path = write_records(tmp_path / "a.json", [pair("p q", " a x y z", " b x y z"), pair("p", " x", " y")])
    found = check_tokens(path, 4, side)
    assert counts(found.findings) == expected
    assert found.counts["truncated_responses"] == 4
    expected = "  before truncation      min 5, 25% 5, 50% 7, 75% 9, 95% 9, max 9 tokens a sequence"
    assert (format_file(found)[-1], list(found.lengths)) == (expected, [9, 9, 5, 5])
    if side == "left":
        assert found.findings["prompts cut away"][0] == "record 1: response 1"


def test_prompt_with_one_token_left_is_not_cut_away(tmp_path):
    """bos p q sep a x eos: 5 of 7 tokens leave q, 4 leave no token of the prompt."""
    path = write_records(tmp_path / "a.json", [pair("p q", " a x", " b x")])
    assert counts(check_tokens(path, 5).findings) == {}
    assert counts(check_tokens(path, 4).findings) == {"prompts cut away": 2}


def test_tokens_by_hand(tmp_path):
    """Item 1: a prompt of 8 and responses of 1, 2, 3 tokens: sequences of 12, 13, 14. Item 2: two of 5. In all 49.

    Padded as one batch: 5 rows of 14. The tree of item 1 holds bos, prompt and sep once, 10 tokens, then 2 + 3 + 4;
    that of item 2 bos p sep and 2 + 2.
    """
    group = {"text": [f"a b c d e f g h<sep> {response}" for response in ("u", "v v", "w w w")], "scores": [2, 1, 0]}
    path = write_records(tmp_path / "a.json", [group, pair("p", " x", " y")])
    found = check_tokens(path, 20).counts
    assert (found["tokens"], found["tokens_padded"], found["tokens_as_trees"]) == (49, 70, 26)


def test_each_batch_is_padded_to_its_own_longest_sequence(tmp_path):
    """Eight items of two sequences of 6, and one of two sequences of 5."""
    records = [pair("p", f" {i} a", f" {i} b") for i in range(8)] + [pair("p", " x", " y")]
    found = check_tokens(write_records(tmp_path / "a.json", records), 20)
    assert found.counts["tokens_padded"] == found.counts["tokens"] == 16 * 6 + 2 * 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_counts_are_those_of_training(side):
    path = SAMPLE / "eval_data" / "hh_cleaned_origin.test.json"
    settings = {"max_length": 64, "truncation_side": side, "add_sep_token": True}
    tokenizer = load_reward_tokenizer(str(CHECKPOINT))
    rows = list(tokenize_records(load_preference_data(path, "comparison_pair"), tokenizer, **settings))
    found = check_file(str(path), "train", settings, tokenizer)
    expected = {name: sum(row[name] for row in rows) for name in ("num_pairs", "num_truncated", "num_identical")}
    assert expected["num_truncated"] > 0 and (side == "left" or expected["num_identical"] > 0)
    assert expected == {
        "num_pairs": found.counts["pairs"],
        "num_truncated": found.counts["truncated_responses"],
        "num_identical": len(found.findings["pairs of equal tokens"]),
    }
    assert found.counts["tokens"] == sum(row["num_tokens"] for row in rows)


def test_settings_are_those_of_the_checkpoint_unless_given(tmp_path, run_main):
    shutil.copytree(CHECKPOINT, tmp_path / "rm")
    recorded = {"max_length": 128, "truncation_side": "right", "sep_token_id": 4}
    write_records(
        tmp_path / "rm" / "config.json", read_json(CHECKPOINT / "config.json") | {"reward_settings": recorded}
    )
    path = write_records(tmp_path / "a.json", [pair()])
    flags = ["--model_name_or_path", tmp_path / "rm", "--truncation_side", "left"]
    _, stdout, _ = run_main("--train_data_path", path, *flags)
    assert "settings: {'max_length': 128, 'truncation_side': 'left', 'add_sep_token': False}" in stdout


# ------------------------------------------------------------------------------------------------ between files


def test_unmatched_ids_by_hand(tmp_path):
    """Golden 1, 2, 3 in two files, sampled 3, 4: without sampled ones are 1 and 2, without a golden one is 4."""
    files = {
        "a": [golden("1", "a"), golden("2", "b")],
        "b": [golden("3", "c")],
        "c": [sampled("3", "c"), sampled(4, "d")],
    }
    checks = [check(write_records(tmp_path / name, records)) for name, records in files.items()]
    findings = compare_files(checks)
    assert findings["golden responses without samples"] == [
        f"{tmp_path}/a: record 1: id 1",
        f"{tmp_path}/a: record 2: id 2",
    ]
    assert findings["samples without a golden response"] == [f"{tmp_path}/c: record 2: id 4"]
    assert len(findings) == 2
    assert compare_files(checks[:2]) == {} and compare_files(checks[2:]) == {}


def test_overlap_by_hand(tmp_path):
    """Evaluation records 1 and 3 have the prompt of training record 2, white space aside: one prompt. The sampled
    responses, a training file, share it: a finding with the evaluation file only. Texts without prompt share none."""
    train = [pair("One?"), pair("\n\nHuman: Two?"), {"text": ["a", "b"], "scores": [1, 0]}]
    evaluation = [pair("\n\nHuman:  Two? "), {"text": ["c", "d"], "scores": [1, 0]}, pair("\n\nHuman: Two?", " x")]
    checks = [
        check(write_records(tmp_path / "train.json", train)),
        check(write_records(tmp_path / "samples.json", [sampled("1", "\n\nHuman: Two?")])),
        check(write_records(tmp_path / "eval.json", evaluation), "eval"),
    ]
    assert compare_files(checks) == {
        "training prompts in evaluation files": [
            f"record 2 of {tmp_path}/train.json and record 1 of {tmp_path}/eval.json",
            f"record 1 of {tmp_path}/samples.json and record 1 of {tmp_path}/eval.json",
        ]
    }


# ------------------------------------------------------------------------------------------------ command line


def test_unpaired_surrogate_is_a_finding(tmp_path, run_main):
    """As a value and as the name of a field."""
    path, half = tmp_path / "a.json", "\\ud83d"  # which no file can hold
    path.write_text(f'[{{"text": "{half}", "scores": [1, 0]}}, {{"{half}": 1}}]')
    _, stdout, _ = run_main("--train_data_path", path)
    assert 'found the string "?"' in stdout and "the record has ?" in stdout
    assert "findings in total: 2" in stdout


CLEAN = [pair(good=" long"), {"text": ["a<sep> b", "a<sep> c"], "scores": [1, 1]}]  # a tie and a bias are no finding


@pytest.mark.parametrize(("name", "records"), [("duplicates", [pair(), pair()]), ("", CLEAN)])
def test_findings_are_printed_and_change_the_exit_status_with_strict(tmp_path, run_main, name, records):
    path = write_records(tmp_path / "a.json", records)
    status, stdout, stderr = run_main("--train_data_path", path, "--strict")
    assert (status, stderr) == (2 if name else 0, "")
    assert f"findings in total: {1 if name else 0}" in stdout
    assert "left out without --model_name_or_path" in stdout
    assert f"FOUND 1 {name}" in stdout if name else "nothing found" in stdout
    assert run_main("--train_data_path", path)[0] == 0


@pytest.mark.parametrize(("content", "words"), [("[{", ["broken JSON"]), ('[{"text": 1}]', ["bad records", "text"])])
def test_bad_records_and_unreadable_files_change_the_exit_status_without_strict(tmp_path, run_main, content, words):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    for path in (tmp_path / "a.json", tmp_path / "none.json"):
        status, stdout, _ = run_main("--train_data_path", path)
        assert status == 2 and "FOUND 1" in stdout
    assert all(word in run_main("--train_data_path", tmp_path / "a.json")[1] for word in words)


def test_doubts_and_fields_that_nothing_reads_are_reported(tmp_path):
    """The dialogue without a prompt is a statistic, not a finding."""
    records = [pair(good=" "), pair("What?", margin=1), {"chosen": "a", "rejected": "b", "margin": 2}]
    found = check(write_records(tmp_path / "a.json", records))
    assert counts(found.findings) == {"records in which an empty response is preferred": 1}
    assert found.counts["no_prompt"] == 1 and found.counts["field margin passed over"] == 2


def test_strict_counts_findings_across_files(tmp_path, run_main):
    train = write_records(tmp_path / "train.json", [golden("1")])
    evaluation = write_records(tmp_path / "eval.json", [sampled("2")])
    status, stdout, _ = run_main("--train_data_path", train, "--eval_data_path", evaluation, "--strict")
    assert status == 2
    assert "findings in total: 3" in stdout  # the prompt, and an id in each file that the other one lacks


def test_sample_data_is_clean_under_strict():
    """Without the files of the game, which hold prompts alone, or golden responses for an LLM."""
    folders = (SAMPLE / "rm_data", SAMPLE / "llm_data")
    train = [SAMPLE / "hh_cleaned_origin.train.json", *(path for folder in folders for path in folder.glob("hh_*"))]
    evaluation = (SAMPLE / "eval_data").glob("hh_*")
    done = run_tool("check_data.py", "--train_data_path", *train, "--eval_data_path", *evaluation, "--strict")
    assert "findings in total: 0" in done.stdout and "FOUND" not in done.stdout


def test_broken_file_does_not_stop_the_check_of_the_others(tmp_path, run_main):
    broken = tmp_path / "broken.json"
    broken.write_text("[{", encoding="utf-8")
    path = SAMPLE / "rm_data" / "hh_split_rm.train.json"
    flags = ("--model_name_or_path", CHECKPOINT, "--max_length", 256, "--add_sep_token", "True", "--strict")
    status, stdout, _ = run_main("--train_data_path", broken, path, *flags)
    first, second, *_, settings, total = stdout.split("\n\n")
    assert (status, total) == (2, "findings in total: 1\n")
    assert first.startswith(f"{broken} (train): unknown, 0 good records\n  FOUND 1")
    assert second.startswith(f"{path} (train): comparison_pair, 440 good records\n  nothing found")
    assert "'max_length': 256" in settings and "'add_sep_token': True" in settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to check"),
        (
            ["--eval_data_path", __file__, "--max_length", 7],
            "--max_length: found 7, expected a whole number of at least 8",
        ),
        (["--eval_data_path", __file__, "--add_sep_token", "maybe"], "invalid choice: 'maybe'"),
    ],
)
def test_wrong_arguments_are_refused(run_main, words, message):
    status, stdout, stderr = run_main(*words)
    assert (status, stdout) == (2, "") and message in stderr
