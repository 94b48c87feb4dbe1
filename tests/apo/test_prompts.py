"""Prompts, dialogues and the form of responses."""

import gzip
import json

import pytest
from conftest import pair, write_records

from apo.cli import BadField, InputError
from apo.prompts import (
    GOLDEN_STOP_STRINGS,
    SAMPLE_STOP_STRINGS,
    Prompt,
    chat_messages,
    count_cuts,
    format_response,
    hash_prompts,
    llama_2_chat_text,
    render_prompts,
)
from apo.records import load_prompts

DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"


def test_prompts_of_pairs_and_of_queries_are_the_same(tmp_path):
    pairs = [pair("A?", query_id="a"), pair("B?", query_id="b")]
    queries = [{"query_id": "a", "query": "A?"}, {"query_id": "b", "query": "B?"}]
    expected = [Prompt("record 1", "a", "A?"), Prompt("record 2", "b", "B?")]
    assert load_prompts(write_records(tmp_path / "pairs.json", pairs)) == expected
    assert load_prompts(write_records(tmp_path / "queries.json", queries)) == expected
    assert load_prompts(write_records(tmp_path / "queries.json", queries), "reject_sample") == expected


def test_json_lines_and_gzip_are_read_and_are_the_same_prompts(tmp_path):
    queries = [{"query": "A?"}, {"query": "B?"}]
    lines = "".join(json.dumps(query) + "\n" for query in queries)
    (tmp_path / "q.jsonl").write_text(lines)
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "q.json.gz").write_bytes(gzip.compress(json.dumps(queries).encode()))
    write_records(tmp_path / "q.json", queries)
    files = [load_prompts(tmp_path / name) for name in ("q.json", "q.jsonl", "q.jsonl.gz", "q.json.gz")]
    assert [[(p.query_id, p.query) for p in prompts] for prompts in files] == [[("0", "A?"), ("1", "B?")]] * 4
    assert len({hash_prompts(prompts) for prompts in files}) == 1
    assert files[1][1].place == "line 2"


@pytest.mark.parametrize(
    ("records", "data_type", "message"),
    [
        ([{"query": "A?"}, {"query": 1}], None, r'p.json: record 2: field "query": found the number 1'),
        ([pair(), {"text": ["a"], "scores": [1]}], None, r"p.json: record 2: .*at least two"),
        ([pair()], "reject_sample", r'record 1: field "query": found no such field'),
        ([{"query": "A?", "query_id": 1}, {"query": "B?", "query_id": "1"}], None, r"record 2: .*which record 1 has"),
        (
            [{"text": ["a", "b"], "scores": [1, 0]}],
            None,
            r"record 1: .*found no prompt, expected one, in a text before <sep>",
        ),
    ],
)
def test_errors_name_the_record(records, data_type, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_prompts(write_records(tmp_path / "p.json", records), data_type)


def test_dialogue_becomes_messages():
    assert chat_messages(DIALOGUE) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why?"},
    ]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("Why?", [("user", "Why?")]),
        ("\n\nHuman: Why?", [("user", "Why?")]),
        ("Why?\n\nAssistant:", [("user", "Why?")]),
        ("\n\nSystem: Be kind.\n\nHuman: Why?\n\nAssistant:", [("system", "Be kind."), ("user", "Why?")]),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", [("user", "a\n\nb")]),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant:", [("user", "a\n\nb")]),
        ("\n\nHuman: a\n\nb\n\nAssistant:", [("user", "a\n\nb")]),
    ],
)
def test_roles_alternate_in_unusual_dialogues(query, expected):
    assert [(m["role"], m["content"]) for m in chat_messages(query)] == expected


@pytest.mark.parametrize("query", ["\n\nHuman: a\n\nAssistant: Sure, ", "\n\nAssistant:", "\n\nHuman:"])
def test_dialogue_must_end_with_the_user(query):
    with pytest.raises(BadField, match="a dialogue that ends with a user turn"):
        chat_messages(query)


def test_llama_2_chat_format():
    assert llama_2_chat_text(DIALOGUE) == "[INST] Hi [/INST] Yes? </s><s>[INST] Why? [/INST]"
    with_system = llama_2_chat_text("\n\nSystem: Be kind." + DIALOGUE)
    assert with_system.startswith("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Yes?")


def test_rendering_names_file_and_record():
    prompts = [Prompt("record 1", "a", DIALOGUE), Prompt("line 7", "b", "\n\nHuman: a\n\nAssistant: b")]
    assert render_prompts("f.json", prompts, "plain") == [prompt.query for prompt in prompts]
    with pytest.raises(InputError, match=r'f.json: line 7: field "query": found the string .* at the end'):
        render_prompts("f.json", prompts, "chat")


@pytest.mark.parametrize(
    ("text", "response"),
    [
        ("Because.", " Because."),
        ("  Because. \n", " Because."),
        (" Because.\n\nHuman: And?", " Because."),
        ("\n\nHuman: And?", ""),
        ("Human beings are.", " Human beings are."),
        ("", ""),
        ("a \ud83d", " a ?"),
    ],
)
def test_response_has_the_form_of_the_data(text, response):
    assert format_response(text, SAMPLE_STOP_STRINGS) == format_response(text, GOLDEN_STOP_STRINGS) == response


def test_lines_about_humans_are_cut_from_samples_only():
    """The reference cuts sampled responses at "\\nHuman"; a golden response may have such a line."""
    texts = ["Yes:\nHumans need water.", "See\nHuman Resources: 3rd floor", "Yes.\nHuman: And?", "Human: I am."]
    golden = [" Yes:\nHumans need water.", " See\nHuman Resources: 3rd floor", " Yes.", " Human: I am."]
    assert [format_response(text, GOLDEN_STOP_STRINGS) for text in texts] == golden
    assert [format_response(text, SAMPLE_STOP_STRINGS) for text in texts] == [
        " Yes:",
        " See",
        " Yes.",
        " Human: I am.",
    ]
    assert (count_cuts(texts, GOLDEN_STOP_STRINGS), count_cuts(texts, SAMPLE_STOP_STRINGS)) == (1, 3)


def test_key_of_a_prompt_changes_with_id_and_text_and_not_with_its_place():
    keys = [Prompt(*fields).key for fields in (("1", "a", "A"), ("2", "a", "A"), ("1", "b", "A"), ("1", "a", "B"))]
    assert keys[0] == keys[1] and len(set(keys)) == 3
