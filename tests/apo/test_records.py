"""Preference records: every format reads, and every wrong record is named."""

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from conftest import REPO_ROOT, pair, read_json, write_records
from hypothesis import given, settings
from hypothesis import strategies as st

from apo.cli import InputError, OneLineParser, describe_counts, exit_on_input_error, write_json
from apo.records import iter_preference_data, iter_records, load_preference_data, read_records

PAIRS = [pair(f"Question {i}?", f" answer {i}", " none", query_id=f"q{i}") for i in range(3)]


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_records(tmp_path, name):
    path = tmp_path / name
    text = "\n".join(map(json.dumps, PAIRS)) + "\n" if "jsonl" in name else json.dumps(PAIRS)
    if name.endswith("parquet"):
        datasets.Dataset.from_list(PAIRS).to_parquet(str(path))
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text("\ufeff" + text, encoding="utf-8")  # a byte order mark, as Windows editors leave
    records = load_preference_data(path, "comparison_pair", add_sep_token=True)
    assert [record.prompts for record in records] == [[f"Question {i}?"] * 2 for i in range(3)]
    assert [record.responses for record in records] == [[f" answer {i}", " none"] for i in range(3)]
    assert [record.scores for record in records] == [[1.0, 0.0]] * 3
    assert [record.query_id for record in records] == ["q0", "q1", "q2"]


def test_record_places_are_record_numbers_or_line_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(PAIRS[0])}\n\n{json.dumps(PAIRS[1])}")
    assert [place for place, _ in read_records(tmp_path / "a.jsonl")] == ["line 2", "line 4"]
    assert [place for place, _ in read_records(write_records(tmp_path / "a.json", PAIRS))] == [
        "record 1",
        "record 2",
        "record 3",
    ]


CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
QUESTION = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    "record, prompt, responses",
    [
        ({"prompt": "Why?", "chosen": " So.", "rejected": " No."}, "Why?", [" So.", " No."]),
        ({"chosen": "Why? So.", "rejected": "Why? No."}, "", ["Why? So.", "Why? No."]),
        (
            {
                "prompt": [*CONVERSATION, QUESTION],
                "chosen": [{"role": "assistant", "content": "So."}],
                "rejected": [{"role": "assistant", "content": "No."}],
            },
            "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:",
            [" So.", " No."],
        ),
        (
            {
                "chosen": [QUESTION, {"role": "assistant", "content": "So."}],
                "rejected": [QUESTION, {"role": "assistant", "content": "No."}],
            },
            "\n\nHuman: Why?\n\nAssistant:",
            [" So.", " No."],
        ),
    ],
    ids=["plain", "without prompt", "conversational", "conversational with the prompt inside"],
)
def test_chosen_over_rejected_records_are_read(tmp_path, record, prompt, responses):
    [parsed] = load_preference_data(write_records(tmp_path / "a.json", [record]), "comparison_pair")
    assert (parsed.prompts, parsed.responses, parsed.scores) == ([prompt] * 2, responses, [1.0, 0.0])


def test_chosen_over_rejected_columns_of_a_parquet_file_are_read(tmp_path):
    """Rows of a parquet file all have the same columns; the ones that a record lacks are null."""
    rows = [{"prompt": "Why?", "chosen": " So.", "rejected": " No."}, {"chosen": "a", "rejected": "b"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    records = load_preference_data(tmp_path / "a.parquet", "comparison_pair")
    assert [record.prompts[0] for record in records] == ["Why?", ""]


def test_answers_to_score_are_read_under_any_of_their_keys(tmp_path):
    record = {
        "query_id": 7,
        "query": "Why?",
        "sample_0": " So.",
        "ans_b": "",
        "my_gpt4": " Yes.",
        "golden": " Not me.",
    }
    [parsed] = load_preference_data(write_records(tmp_path / "a.json", [record]), "reject_sample")
    assert parsed.answer_keys == ["sample_0", "ans_b", "my_gpt4"]
    assert parsed.responses == [" So.", "", " Yes."]
    assert (parsed.prompts, parsed.query_id) == (["Why?"] * 3, "7")


def test_text_without_separator_is_one_whole_sequence_unless_separators_are_asked_for(tmp_path):
    path = write_records(tmp_path / "a.json", [{"text": ["all of it", "or this"], "scores": [1, 0]}])
    [record] = load_preference_data(path, "comparison_pair", add_sep_token=False)
    assert (record.prompts, record.responses) == (["", ""], ["all of it", "or this"])
    with pytest.raises(InputError, match="found no <sep>"):
        load_preference_data(path, "comparison_pair", add_sep_token=True)


def test_type_apo_marks_golden_over_sampled_items(tmp_path):
    path = write_records(tmp_path / "a.json", [pair(type="apo"), pair(type="human"), pair()])
    assert [record.is_apo for record in load_preference_data(path, "comparison_pair")] == [True, False, False]


# ------------------------------------------------------------------------------------------------ validating


GOOD = {"text": ["a<sep>b", "a<sep>c"], "scores": [1, 0]}
BAD_RECORDS = {
    "no object": (5, "found the number 5, expected an object"),
    "a list": ([1, 2], "found a list of 2, expected an object"),
    "text missing": ({"scores": [1, 0]}, 'field "text": found no such field .the record has scores., expected a list'),
    "text a string": (GOOD | {"text": "a<sep>b"}, 'field "text": found the string "a<sep>b", expected a list'),
    "text of a number": (GOOD | {"text": ["a<sep>b", 5]}, 'field "text.1.": found the number 5, expected a non-empty'),
    "text of null": (GOOD | {"text": ["a<sep>b", None]}, 'field "text.1.": found null, expected a non-empty string'),
    "empty text": (GOOD | {"text": ["", "a<sep>c"]}, 'field "text.0.": found "", expected a non-empty string'),
    "blank text": (
        GOOD | {"text": ["a<sep>b", " \n"]},
        r'field "text.1.": found the string " .n", expected a non-empty',
    ),
    "scores missing": ({"text": GOOD["text"]}, 'field "scores": found no such field .the record has text., expected'),
    "scores a number": (GOOD | {"scores": 1}, 'field "scores": found the number 1, expected a list of numbers'),
    "scores shorter": (GOOD | {"scores": [1]}, 'field "scores": found 1 scores, expected 2'),
    "scores longer": (GOOD | {"scores": [1, 0, 0]}, 'field "scores": found 3 scores, expected 2'),
    "score a string": (
        GOOD | {"scores": [1, "0"]},
        r'field "scores\[1\]": found the string "0", expected a finite number',
    ),
    "score out of range": (
        GOOD | {"scores": [1e308, -1e308]},
        r'field "scores\[0\]": found the number 1e.308, expected a finite number, at most 1e.38 in size',
    ),
    "score null": (GOOD | {"scores": [None, 0]}, r'field "scores\[0\]": found null, expected a finite number'),
    "score true": (GOOD | {"scores": [True, 0]}, r'field "scores\[0\]": found true, expected a finite number'),
    "score NaN": (
        GOOD | {"scores": [float("nan"), 0]},
        r'field "scores\[0\]": found the number nan, expected a finite',
    ),
    "score infinite": (
        GOOD | {"scores": [1, float("inf")]},
        r'field "scores\[1\]": found the number inf, expected a fin',
    ),
    "score beyond floats": (
        GOOD | {"scores": [1, 10**400]},
        r'field "scores\[1\]": found .*, expected a finite number',
    ),
    "one response": (
        {"text": ["a<sep>b"], "scores": [1]},
        r'field "text": found 1 response\(s\), expected at least two',
    ),
    "no separator": (GOOD | {"text": ["a b", "a<sep>c"]}, r'field "text\[0\]": found no <sep>, expected one <sep>'),
    "two separators": (
        GOOD | {"text": ["a<sep>b", "a<sep>b<sep>c"]},
        r'field "text\[1\]": found 2 <sep>, expected one',
    ),
    "query_id a list": (
        GOOD | {"query_id": [1]},
        'field "query_id": found a list of 1, expected a non-empty string or an integer',
    ),
    "only chosen": ({"chosen": "b"}, 'field "rejected": found no such field'),
    "plain prompt, dialogues": (
        {"prompt": "a", "chosen": [QUESTION], "rejected": [QUESTION]},
        'field "prompt": found the string "a", expected a list of mess',
    ),
    "dialogue ends with user": (
        {"chosen": [QUESTION], "rejected": [QUESTION]},
        'field "chosen/rejected": found no assistant message',
    ),
    "role in a list": (
        {"chosen": [{"role": ["user"], "content": "b"}], "rejected": [QUESTION]},
        'field "chosen/rejected": found an object with role, content, expected a message with a role',
    ),
    "unknown role": (
        {"chosen": [{"role": "bot", "content": "b"}], "rejected": [QUESTION]},
        'field "chosen/rejected": found .*, expected a message',
    ),
}


@pytest.mark.parametrize("record, message", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_wrong_record_is_named_with_file_place_field_found_and_expected(tmp_path, record, message):
    path = write_records(tmp_path / "a.json", [GOOD, record])
    with pytest.raises(InputError, match=f"^{path}: record 2: {message}") as error:
        load_preference_data(path, "comparison_pair", add_sep_token=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"query": "a", "sample_0": "b"}, 'field "query_id": found no such field'),
        ({"query_id": "q", "sample_0": "b"}, 'field "query": found no such field'),
        (
            {"query_id": "q", "query": "a", "answer": "b"},
            'field "sample_0": found no answer .the record has query_id, query, answer.',
        ),
        ({"query_id": "q", "query": "a", "sample_0": 3}, 'field "sample_0": found the number 3, expected a string'),
    ],
)
def test_wrong_record_to_score_is_named(tmp_path, record, message):
    path = write_records(tmp_path / "a.json", [record])
    with pytest.raises(InputError, match=f"^{path}: record 1: {message}"):
        load_preference_data(path, "reject_sample")


def test_all_bad_records_are_counted_and_the_first_five_shown(tmp_path):
    path = write_records(tmp_path / "a.json", [GOOD] + [GOOD | {"scores": [i]} for i in range(8)])
    with pytest.raises(InputError, match=r"8 bad records: record 2: .*; and 3 more") as error:
        load_preference_data(path, "comparison_pair")
    assert "record 6" in str(error.value) and "record 7" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"[]", "the file holds no records"),
        (b'[{"a": 1},\n {"b" 2}]', "broken JSON at line 2 column 7"),
        (b'{"a": 1}\n\n{"b": 2', "broken JSON at line 3 column 8"),
        (b'{"a": 1}\n7', "line 2: found the number 7, expected an object"),
        (b'["\xff"]', "cannot be read as UTF-8"),
        (b"[" + b"1" * 5000 + b"]", "unreadable JSON .Exceeds the limit"),
    ],
)
def test_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}: {message}") as error:
        read_records(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["no gzip", "cut", "flipped"])
def test_broken_gzip_file_is_named(tmp_path, damage):
    whole = gzip.compress(json.dumps(PAIRS * 50).encode())
    flipped = whole[:20] + bytes(255 - byte for byte in whole[20:40]) + whole[40:]
    content = {"no gzip": b"[]", "cut": whole[: len(whole) // 2], "flipped": flipped}[damage]
    (tmp_path / "a.json.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json\.gz: cannot be read as gzipped UTF-8"):
        read_records(tmp_path / "a.json.gz")


def test_parquet_value_that_no_json_has_is_described(tmp_path):
    datasets.Dataset.from_list([{**PAIRS[0], "query_id": b"a"}]).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match=r'field "query_id": found a value of type bytes, expected'):
        load_preference_data(tmp_path / "a.parquet", "comparison_pair")


def test_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as parquet") as error:
        read_records(tmp_path / "a.parquet")
    assert "\n" not in str(error.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "scores", "chosen"]), inner),
    max_leaves=8,
)


@given(st.lists(JSON_VALUES | st.fixed_dictionaries({"text": JSON_VALUES, "scores": JSON_VALUES}), max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_json_is_either_read_or_refused_in_one_line(tmp_path_factory, records):
    path = write_records(tmp_path_factory.getbasetemp() / "any.json", records)
    try:
        parsed = load_preference_data(path, "comparison_pair", add_sep_token=True)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert len(parsed) == len(records) > 0


@given(st.lists(JSON_VALUES, max_size=4), st.sampled_from([None, 1]), st.integers(1, 40), st.data())
@settings(max_examples=150, deadline=None)
def test_list_read_in_chunks_is_read_or_refused_as_the_whole_text_is(tmp_path_factory, values, indent, size, data):
    """Chunks of a few characters end inside strings, numbers and marks; half of the texts are cut or have a tail."""
    text = json.dumps([{"a": value} for value in values], indent=indent)
    text = data.draw(st.just(text) | st.integers(1, len(text) - 1).map(lambda end: text[:end]) | st.just(text + " 1"))
    path = tmp_path_factory.getbasetemp() / "chunks.json"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apo.records.CHUNK_SIZE", size)
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            with pytest.raises(InputError) as refused:
                read_records(path)
            assert f"line {error.lineno} column {error.colno}: {error.msg}; " in str(refused.value)
        else:
            if expected:
                assert repr([record for _, record in read_records(path)]) == repr(expected)  # NaN is not itself


def test_position_of_wrong_bytes_is_that_in_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(PAIRS[0]).encode() + b"\n" * 50_000 + b"\xff")
    position = len(json.dumps(PAIRS[0])) + 50_000
    with pytest.raises(InputError, match=f"cannot be read as UTF-8 .*0xff in position {position}:"):
        read_records(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_records_are_read_one_by_one(tmp_path, name, monkeypatch):
    """The first record is there although the second is broken."""
    monkeypatch.setattr("apo.records.CHUNK_SIZE", 1)
    first = json.dumps(PAIRS[0])
    (tmp_path / name).write_text(f"[{first},\n7 7]" if name == "a.json" else f"{first}\n7 7")
    records = iter_records(tmp_path / name)
    assert next(records)[1] == PAIRS[0]
    with pytest.raises(InputError, match="broken JSON at line 2 column 3"):
        next(records)


def test_no_record_comes_behind_a_bad_one(tmp_path):
    path = write_records(tmp_path / "a.json", [GOOD, GOOD, GOOD | {"scores": [1]}, GOOD, GOOD | {"scores": 1}])
    records = iter_preference_data(path, "comparison_pair")
    assert [next(records).query_id, next(records).query_id] == ["0", "1"]
    with pytest.raises(InputError, match=r"2 bad records: record 3: .*; record 5: "):
        next(records)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": "é"})
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(InputError, match="disk full"):
        write_json(path, {"a": "b"})
    assert read_json(path) == {"a": "é"}


@pytest.mark.parametrize(
    ("name", "text"), [("file/a.json", "b"), ("folder", "b"), ("a.json", "\ud83d")], ids=["below", "folder", "text"]
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, name, text):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=rf"{name}: cannot be written \(.*\); give another place, or fix the text$"):
        write_json(tmp_path / name, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --seed; see --help"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'; see --help"),
        (["--seed", "1", "--nonsense"], "unrecognized arguments: --nonsense; see --help"),
        (["--see", "1"], "required: --seed; see --help"),
    ],
)
def test_flags_that_are_refused_are_one_line(argv, message):
    """An abbreviated flag is no flag."""
    parser = OneLineParser(description="A tool.")
    parser.add_argument("--seed", type=int, required=True)
    with pytest.raises(InputError, match=message):
        parser.parse_args(argv)


def test_counts_are_put_into_words():
    assert describe_counts(Counter(b=2, a=1, c=0), "answers") == "3 answers (1 a, 2 b)"
    assert describe_counts(Counter(), "pairs") == "0 pairs"


def test_readers_need_no_heavy_package():
    """Tools import the readers; torch and transformers would cost them seconds."""
    import subprocess
    import sys

    code = "import sys, reward_datasets; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_process_reports_its_error_in_one_line(monkeypatch, capsys):
    @exit_on_input_error
    def main() -> None:
        raise InputError("no\nline")

    for rank, line in (("0", "error: no\\nline\n"), ("1", "error of rank 1: no\\nline\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            main()
        assert capsys.readouterr().err == line


def test_text_that_is_no_valid_unicode_is_named(tmp_path):
    r"""JSON can write \ud800, half of a surrogate pair, which no file and no tokenizer can hold."""
    (tmp_path / "a.json").write_text(r'[{"text": ["a<sep>b", "a<sep>\ud800"], "scores": [1, 0]}]')
    with pytest.raises(InputError, match=r'record 1: field "text.1.": found half a surrogate pair at character 7'):
        load_preference_data(tmp_path / "a.json", "comparison_pair")
