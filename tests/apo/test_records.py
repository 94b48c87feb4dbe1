"""Records: every format is read, every kind is parsed, and a wrong record is reported with its place."""

import gzip
import json

import datasets
import pytest
from conftest import REPO_ROOT, pair, write_records
from hypothesis import given, settings
from hypothesis import strategies as st

from apo.cli import BadField, InputError
from apo.records import (
    PreferenceRecord,
    find_response_keys,
    iter_preference_data,
    iter_records,
    iter_valid,
    load_preference_data,
    load_prompts,
    load_rewards,
    parse_record,
    record_kind,
)

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
        path.write_text("\ufeff" + text, encoding="utf-8")  # a byte order mark, as Windows editors write
    records = load_preference_data(path, "comparison_pair", add_sep_token=True)
    assert [record.prompts for record in records] == [[f"Question {i}?"] * 2 for i in range(3)]
    assert [record.responses for record in records] == [[f" answer {i}", " none"] for i in range(3)]
    assert [record.scores for record in records] == [[1.0, 0.0]] * 3
    assert [record.query_id for record in records] == ["q0", "q1", "q2"]


def test_record_places_are_record_numbers_or_line_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(PAIRS[0])}\n\n{json.dumps(PAIRS[1])}")
    assert [place for place, _ in iter_records(tmp_path / "a.jsonl")] == ["line 2", "line 4"]
    assert [place for place, _ in iter_records(write_records(tmp_path / "a.json", PAIRS))] == [
        "record 1",
        "record 2",
        "record 3",
    ]


CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
QUESTION = {"role": "user", "content": "Why?"}
MESSAGES = {"chosen": [QUESTION, CONVERSATION[1]], "rejected": [QUESTION, CONVERSATION[1]]}


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


def test_responses_to_score_are_in_file_order_and_those_to_pair_in_numeric_order():
    record = {"query": "Why?", "sample_10": "a", "ans_0": "", "my_gpt4": "c", "sample_2": "d", "sample_id": "e"}
    assert find_response_keys(record) == ["sample_10", "ans_0", "sample_2"]
    assert find_response_keys(record, ["my_gpt4"]) == ["sample_10", "ans_0", "my_gpt4", "sample_2"]
    assert find_response_keys(record, samples_only=True) == ["sample_2", "sample_10"]


@pytest.mark.parametrize(
    ("kind", "fields", "responses"),
    [
        ("reject_sample", {"sample_1": " So.", "sample_0": ""}, {"sample_1": " So.", "sample_0": ""}),
        ("sampled", {"sample_1": " So.", "sample_0": ""}, {"sample_0": "", "sample_1": " So."}),
        ("golden", {"golden": " So.", "sample_0": " No."}, {"golden": " So."}),
    ],
)
def test_query_records_become_records_of_responses(tmp_path, kind, fields, responses):
    path = write_records(tmp_path / "a.json", [{"query_id": 7, "query": "Why?", **fields}])
    num, keys = len(responses), list(responses)
    expected = PreferenceRecord(["Why?"] * num, list(responses.values()), [0.0] * num, "7", keys, place="record 1")
    assert load_preference_data(path, kind) == [expected]


def test_kind_of_a_record_follows_from_its_fields():
    assert record_kind(pair()) == "comparison_pair"
    assert record_kind({"query": "Why?", "golden": " So."}) == "golden"
    assert record_kind({"query": "Why?", "sample_0": " So."}) == "reject_sample"


def test_rewards_are_read_in_file_order(tmp_path):
    path = write_records(tmp_path / "a.json", [{"b:sample_0": 1}, {"a:1:sample_0": -0.5, "a:sample_1": 2}])
    assert list(load_rewards(path).items()) == [("b:sample_0", 1.0), ("a:1:sample_0", -0.5), ("a:sample_1", 2.0)]


def test_text_without_separator_is_one_whole_sequence_unless_add_sep_token_is_set(tmp_path):
    path = write_records(tmp_path / "a.json", [{"text": ["all of it", "or this"], "scores": [1, 0]}])
    [record] = load_preference_data(path, "comparison_pair", add_sep_token=False)
    assert (record.prompts, record.responses) == (["", ""], ["all of it", "or this"])
    with pytest.raises(InputError, match="found no <sep>"):
        load_preference_data(path, "comparison_pair", add_sep_token=True)


def test_type_apo_marks_golden_over_sampled_items(tmp_path):
    path = write_records(tmp_path / "a.json", [pair(type="apo"), pair(type="human"), pair()])
    assert [record.is_apo for record in load_preference_data(path, "comparison_pair")] == [True, False, False]


def read(tmp_path, *records):
    return load_preference_data(write_records(tmp_path / "a.json", records), "comparison_pair")


@pytest.mark.parametrize("prompt", ["Why?", [QUESTION], None])
def test_prompt_that_the_messages_repeat_counts_once(tmp_path, prompt):
    [record] = read(tmp_path, MESSAGES | {"prompt": prompt})
    assert record.prompts == ["\n\nHuman: Why?\n\nAssistant:"] * 2


def test_fields_that_nothing_reads_are_named_in_one_line(tmp_path, caplog):
    """Empty fields and those of the format are not; neither are the samples and `golden` of one another."""
    more = {"margin": 2, "system": "Be kind.", "source": "", "n": None, "query_id": 1, "type": "human"}
    message = {"role": "assistant", "content": "Hello", "tool_calls": [1], "weight": None}
    read(tmp_path, pair() | more, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0})
    read(tmp_path, MESSAGES | {"chosen": [QUESTION, message]})
    load_preference_data(write_records(tmp_path / "b.json", [QUERY | {"ans_0": "", "sample_id": "1"}]), "sampled")
    assert [line.split("number of records with: ")[1] for line in caplog.messages] == [
        "field margin passed over (2); "
        "field system passed over, which the model could read as a part of the prompt (1)",
        "field chosen[].tool_calls passed over (1)",
        "field sample_id passed over (1)",
    ]


def test_doubts_about_records_are_counted(tmp_path, caplog):
    """Records 1 and 2 have none: only the response that is not preferred is empty, only one repeats the prompt."""
    turn = pair("Why?", " So.\n\nHuman: Thanks", " No.")
    doubtful = [
        pair("Why?", " ", " No."),
        pair("Why?", "Why? So.", "Why? No."),
        turn,
        {"chosen": "b", "rejected": "c"},
        pair("Why?", "<think>Hm.</think> So.", " No."),
    ]
    found = read(tmp_path, pair("Why?", " So.", ""), pair("Why?", "Why? So.", " No."), *doubtful)
    names = ["empty_preferred", "repeated_prompts", "turns_in_responses", "no_prompt", "reasoning_in_responses"]
    assert [record.remarks for record in found] == [[], [], *([name] for name in names)]
    [line] = caplog.messages
    assert line.count("(1)") == 5
    golden = {"query_id": "a", "query": "Why?", "golden": "<think>Hm.</think> So."}
    [record] = load_preference_data(write_records(tmp_path / "golden.json", [golden]), "golden")
    assert record.remarks == ["reasoning_in_responses"]


# ------------------------------------------------------------------------------------------------ validating


GOOD = {"text": ["a<sep>b", "a<sep>c"], "scores": [1, 0]}
BAD_RECORDS = {
    "a number": (5, "found the number 5, expected an object"),
    "a string": ("hello", 'found the string "hello", expected an object'),
    "text missing": ({"scores": [1, 0]}, 'field "text": found no such field .the record has scores., expected a list'),
    "text of a number": (
        GOOD | {"text": ["a<sep>b", 1]},
        'field "text.1.": found the number 1, expected a non-empty string',
    ),
    "text a string": (GOOD | {"text": "a<sep>b"}, 'field "text": found the string "a<sep>b", expected a list'),
    "text of null": (GOOD | {"text": ["a<sep>b", None]}, 'field "text.1.": found null, expected a non-empty string'),
    "empty text": (GOOD | {"text": ["", "a<sep>b"]}, 'field "text.0.": found "", expected a non-empty string'),
    "blank text": (GOOD | {"text": ["a<sep>b", " "]}, 'field "text.1.": found the string " ", expected a non-empty'),
    "scores missing": (
        {"text": GOOD["text"]},
        'field "scores": found no such field .the record has text., expected a list',
    ),
    "scores shorter": (GOOD | {"scores": [1]}, 'field "scores": found 1 scores, expected 2'),
    "score a string": (
        GOOD | {"scores": [1, "0"]},
        'field "scores.1.": found the string "0", expected a finite number',
    ),
    "score true": (GOOD | {"scores": [True, 0]}, 'field "scores.0.": found true, expected a finite number'),
    "score NaN": (GOOD | {"scores": [float("nan"), 0]}, 'field "scores.0.": found the number nan, expected a finite'),
    "score infinite": (
        GOOD | {"scores": [float("inf"), 0]},
        'field "scores.0.": found the number inf, expected a finite number',
    ),
    "score too large": (GOOD | {"scores": [1, 10**400]}, 'field "scores.1.": found .*, at most 1e.38 in size'),
    "one response": ({"text": ["a<sep>b"], "scores": [1]}, 'field "text": found 1 response.s., expected at least two'),
    "no separator": (GOOD | {"text": ["a b", "a<sep>c"]}, 'field "text.0.": found no <sep>, expected one <sep>'),
    "two separators": (GOOD | {"text": ["a<sep>b", "<sep><sep>"]}, 'field "text.1.": found 2 <sep>, expected one'),
    "unpaired surrogate": (
        GOOD | {"text": ["a<sep>b", "a\ud800"]},
        'field "text.1.": found an unpaired surrogate at character 2',
    ),
    "query_id a list": (
        GOOD | {"query_id": [1]},
        'field "query_id": found a list of 1, expected a non-empty string or',
    ),
    "only chosen": ({"chosen": "b"}, 'field "rejected": found no such field'),
    "prompt a string": (
        MESSAGES | {"prompt": "a"},
        'field "prompt": found the string "a", expected a list of messages',
    ),
    "user at the end": (MESSAGES | {"chosen": [QUESTION]}, 'field "chosen": found no assistant message at the end'),
    "role in a list": (
        MESSAGES | {"chosen": [{"role": ["user"], "content": "b"}]},
        'field "chosen.0..role": found a list of 1, expected user, assistant or system',
    ),
    "content null": (
        MESSAGES | {"rejected": [QUESTION, {"role": "assistant", "content": None}]},
        'field "rejected.1..content": found null, expected a non-empty string',
    ),
    "no question": (
        {"chosen": CONVERSATION[1:], "rejected": CONVERSATION[1:]},
        'field "chosen": found one message, expected the messages of the prompt before it',
    ),
    "messages as a string": (
        {"chosen": "[{'role': 'user', 'content': 'a'}]", "rejected": "b"},
        'field "chosen": found messages as one text',
    ),
    "prompt elsewhere": (
        {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
        'field "instruction, input": found what can be the prompt, but is not read here, expected it in "prompt"',
    ),
    "prompt under another name": (
        {"User_Question": ["a"], "chosen": "c", "rejected": "d"},
        'field "User_Question": found what can be the prompt',
    ),
    "message as a string": (
        {"prompt": "a", "chosen": """{'content': 'b', "role": "assistant"}""", "rejected": "d"},
        'field "chosen": found messages as one text',
    ),
    "prompt beside text": (
        {"prompt": "a", "text": ["b", "c"], "scores": [1, 0]},
        'field "prompt": found what can be the prompt',
    ),
    "separator in a prompt": (
        {"prompt": "a<sep>", "chosen": "b", "rejected": "c"},
        'field "prompt": found a text with <sep>',
    ),
    "no separator and no prompt": (
        {"chosen": "b", "rejected": "c"},
        'field "chosen": found no <sep>, expected one <sep>, a field "prompt", or a run',
    ),
    "two prompts": (
        GOOD | {"text": ["a<sep>b", "c<sep>d"]},
        'field "text.1.": found another prompt, .* "c", expected that of text.0., .* "a"',
    ),
    "two dialogues": (
        MESSAGES | {"rejected": CONVERSATION},
        'field "rejected": found another prompt, .*, expected that of chosen',
    ),
    "both formats": (GOOD | {"chosen": "b"}, 'field "chosen": found text or scores beside it, expected either'),
    "scores that contradict the sides": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 2},
        'field "score_chosen": found 1, expected no less than rejected has, 2',
    ),
    "unknown type": (GOOD | {"type": "APO"}, 'field "type": found the string "APO", expected "apo"'),
}


@pytest.mark.parametrize("record, message", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_wrong_record_is_reported_with_file_place_field_found_and_expected(tmp_path, record, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, record]))
    with pytest.raises(InputError, match=f"^{path}: record 2: {message}") as error:
        list(iter_preference_data(path, "comparison_pair", add_sep_token=True))
    assert "\n" not in str(error.value)


QUERY = {"query_id": 1, "query": "a", "golden": " c", "sample_0": " b"}


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("reject_sample", {"query": "a", "sample_0": "b"}, 'field "query_id": found no such field'),
        ("reject_sample", QUERY | {"query_id": True}, 'field "query_id": found true, expected a non-empty string or'),
        ("reject_sample", QUERY | {"query": " "}, 'field "query": found the string " ", expected a non-empty'),
        ("reject_sample", {"query_id": 1, "query": "a", "b": "c"}, 'field "sample_0": found no response among'),
        ("reject_sample", QUERY | {"sample_1": 3}, 'field "sample_1": found the number 3, expected a string'),
        ("reject_sample", QUERY | {"sample_1": "\ud83d"}, 'field "sample_1": found an unpaired surrogate'),
        ("sampled", {"query_id": 1, "query": "a", "sample_b": "c"}, 'field "sample_0": found no response'),
        ("reject_sample", QUERY | {"sample_1": None}, 'field "sample_1": found null, expected a string'),
        ("sampled", QUERY | {"query": "a<sep>"}, 'field "query": found a text with <sep>'),
        ("golden", {"query_id": 1, "query": "a"}, 'field "golden": found no such field'),
    ],
)
def test_wrong_query_record_is_reported(kind, record, message):
    with pytest.raises(BadField, match=message):
        parse_record(record, "0", kind=kind)


@pytest.mark.parametrize("form", ["list", "lines"])
def test_key_that_comes_twice_in_an_object_is_reported_where_it_is_read(tmp_path, form):
    """Not where a text only looks so, or where nothing reads the field."""
    lines = [json.dumps(pair(r'"a":1,"a":1 \":', ' "text": ')), json.dumps(pair()).replace(":", " :")]
    lines += [json.dumps(pair())[:-1] + end for end in (', "n": 1, "n": 2}', ', "scores"  : [0, 1]}')]
    (tmp_path / "a.json").write_text("\n".join(lines) if form == "lines" else f"[{','.join(lines)}]")
    message = f'^{tmp_path}/a.json: (line|record) 4: field "scores": found an object with two values under one key,'
    with pytest.raises(InputError, match=message):
        load_preference_data(tmp_path / "a.json", "comparison_pair")


def test_null_is_the_same_in_json_and_parquet(tmp_path):
    rows = [{"prompt": None, "chosen": "a", "rejected": "b", "type": None}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert load_preference_data(tmp_path / "a.parquet", "comparison_pair") == read(tmp_path, *rows)


@pytest.mark.parametrize("reward", [True, "1", None, float("nan"), 10**400])
def test_reward_that_is_no_finite_number_is_reported(tmp_path, reward):
    path = write_records(tmp_path / "a.json", [{"a:sample_0": reward}])
    with pytest.raises(InputError, match=r'record 1: field "a:sample_0": found .*, expected a finite number'):
        load_rewards(path)


def test_second_reward_of_a_response_is_reported(tmp_path):
    path = write_records(tmp_path / "a.json", [{"a:sample_0": 1}, {"a:sample_0": 1}])
    with pytest.raises(InputError, match='record 2: field "a:sample_0": found a second reward, expected one'):
        load_rewards(path)


def test_query_ids_must_be_unique_except_in_pairs(tmp_path):
    """Id 1 is the same as "1": rewards and golden responses are matched by the id as a string."""
    path = write_records(tmp_path / "a.json", [QUERY, QUERY | {"query_id": "1"}])
    message = f'^{path}: record 2: field "query_id": found the string "1", which record 1 has too, expected one record'
    for kind in ("reject_sample", "sampled", "golden"):
        with pytest.raises(InputError, match=message):
            load_preference_data(path, kind)
    with pytest.raises(InputError, match=message):
        load_prompts(path)
    assert len(load_preference_data(write_records(path, [pair(query_id="1")] * 2), "comparison_pair")) == 2


def test_all_bad_records_are_counted_and_the_first_five_shown(tmp_path):
    path = write_records(tmp_path / "a.json", [GOOD] + [GOOD | {"scores": [i]} for i in range(8)])
    with pytest.raises(InputError, match=r"8 bad records: record 2: .*; and 3 more") as error:
        load_preference_data(path, "comparison_pair")
    assert "record 6" in str(error.value) and "record 7" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("folder", "found a folder; give the path of an existing"),
        (b"", "the file is empty or holds no records"),
        (b" \n\n", "the file is empty or holds no records"),
        (b"[]", "the file is empty or holds no records"),
        (b'[{"a": 1},\n {"b" 2}]', "broken JSON at line 2 column 7"),
        (b'{"a": 1}\n\n{"b": 2', "broken JSON at line 3 column 8"),
        (b'{"a": 1}\n7', "2 bad records: line 1: .*; line 2: found the number 7, expected an object"),
        (b'["a",\n"\xff"]', "line 2 cannot be read as UTF-8 .*0xff in position 7:"),
        (b'{"a": 1}\n\n"\xff"', "line 3 cannot be read as UTF-8 .*0xff in position 1:"),
        (b"[" + b"1" * 5000 + b"]", "unreadable JSON .Exceeds the limit"),
    ],
)
def test_unreadable_file_is_reported(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}: {message}") as error:
        list(iter_preference_data(path, "comparison_pair"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["no gzip", "cut", "flipped"])
def test_broken_gzip_file_is_reported(tmp_path, damage):
    whole = gzip.compress(json.dumps(PAIRS * 50).encode())
    flipped = whole[:20] + bytes(255 - byte for byte in whole[20:40]) + whole[40:]
    content = {"no gzip": b"[]", "cut": whole[: len(whole) // 2], "flipped": flipped}[damage]
    (tmp_path / "a.json.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json\.gz: cannot be read as gzip"):
        list(iter_records(tmp_path / "a.json.gz"))


def test_parquet_value_that_no_json_has_is_described(tmp_path):
    datasets.Dataset.from_list([{**PAIRS[0], "query_id": b"a"}]).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match=r'field "query_id": found a value of type bytes, expected'):
        load_preference_data(tmp_path / "a.parquet", "comparison_pair")


def test_broken_parquet_file_is_reported(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as parquet") as error:
        list(iter_records(tmp_path / "a.parquet"))
    assert "\n" not in str(error.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "scores", "chosen"]), inner),
    max_leaves=8,
)


@given(st.lists(JSON_VALUES | st.fixed_dictionaries({"text": JSON_VALUES, "scores": JSON_VALUES}), max_size=3))
@settings(max_examples=30, deadline=None)
def test_any_json_is_either_read_or_refused_in_one_line(tmp_path_factory, records):
    path = write_records(tmp_path_factory.getbasetemp() / "any.json", records)
    try:
        parsed = load_preference_data(path, "comparison_pair", add_sep_token=True)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert len(parsed) == len(records) > 0


def test_lines_before_a_broken_one_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(PAIRS[0])}\n7 7")
    records = iter_records(tmp_path / "a.jsonl")
    assert next(records) == ("line 1", PAIRS[0])
    with pytest.raises(InputError, match="broken JSON at line 2 column 3"):
        next(records)


def test_records_after_a_bad_one_are_read_where_bad_ones_are_collected(tmp_path):
    def parse(raw: dict, default_id: str) -> str:
        if "bad" in raw:
            raise BadField("bad", "one", "none")
        return default_id

    path = write_records(tmp_path / "a.json", [{}, {"bad": 1}, {}, 7])
    problems: list[str] = []
    assert list(iter_valid(path, parse, problems=problems)) == [("record 1", "0"), ("record 3", "2")]
    assert problems == [
        'record 2: field "bad": found one, expected none',
        "record 4: found the number 7, expected an object",
    ]
    records = iter_valid(path, parse)
    assert next(records) == ("record 1", "0")
    with pytest.raises(InputError, match=r'2 bad records: record 2: field "bad".*; record 4: found'):
        next(records)


def test_no_record_comes_after_a_bad_one(tmp_path):
    path = write_records(tmp_path / "a.json", [GOOD, GOOD, GOOD | {"scores": [1]}, GOOD, GOOD | {"scores": 1}])
    records = iter_preference_data(path, "comparison_pair")
    assert [next(records).query_id, next(records).query_id] == ["0", "1"]
    with pytest.raises(InputError, match=r"2 bad records: record 3: .*; record 5: "):
        next(records)


def test_readers_need_no_heavy_package():
    """Tools import the readers; torch and transformers would cost them seconds."""
    import subprocess
    import sys

    code = "import sys, reward_datasets; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
