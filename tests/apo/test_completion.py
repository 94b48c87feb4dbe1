"""What counts as a response, and what an error is about."""

import json

import pytest

from apo.cli import InputError
from apo.completion import (
    MAX_WORDS,
    STRIPPED,
    TRUNCATED,
    NoResponseError,
    TemporaryError,
    check_status,
    read_completion,
    shorten,
)

STOPS = ("\nHuman:",)


def body(content: object, finish_reason: object = "stop", **fields: object) -> bytes:
    choice = {"message": {"content": content, **fields}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Red.", "Red."),
        ("<think>\nHm.\n</think>\n\nRed.", "\n\nRed."),
        ("Hm. The template opened it.</think>Red.", "Red."),
        ("[THINK]Hm.[/THINK]Red.", "Red."),
        (" Assistant: Red.", " Red."),
        ("<think></think>assistant: Red.", " Red."),
        ([{"type": "text", "text": "Re"}, {"type": "text", "text": "d."}], "Red."),
        (
            "I think <b>red</b> | 1 < 2 |> 3.\n\nHuman: <|im_end|>",
            "I think <b>red</b> | 1 < 2 |> 3.\n\nHuman: <|im_end|>",
        ),
    ],
)
def test_a_response_is_the_text_after_reasoning_and_role(content, text):
    remarks = [STRIPPED] * (content != text and isinstance(content, str))
    assert read_completion(body(content, reasoning_content="Hm."), STOPS) == (text, remarks)


def test_length_is_a_response_and_counted():
    content = b'{"choices": [{"text": "Re", "finish_reason": "length"}]}'
    assert read_completion(content, STOPS) == ("Re", [TRUNCATED])


NO_RESPONSE = [
    (body("Re", "content_filter"), "content_filter .*content Re"),
    (body("Re", "abort"), "abort"),
    (body("Re", "error"), "error"),
    (body("Re", None), "unknown finish_reason .*null"),
    (body("Re", "insufficient_system_resource"), "unknown finish_reason .*insufficient_system_resource"),
    (body("Re", ["stop"]), "unknown finish_reason"),
    (body("Red.", refusal="I can't."), r"refusal \(I can't.\)"),
    (body(None, "tool_calls", tool_calls=[{"id": "1"}]), "tool calls"),
    (body("Red.", function_call={"name": "f"}), "tool calls"),
    (body("<tool_call>{}</tool_call>"), "token of a template"),
    (body(None), "empty"),
    (body(""), "empty"),
    (body(" \n "), "empty"),
    (body("\n\nHuman: And?"), "empty"),
    (body("Assistant:"), "empty"),
    (body("Human: And?"), "token of a template"),
    (body(None, "length", reasoning_content="Hm"), "only reasoning .*raise --max_new_tokens"),
    (body("<think>Hm", "length"), "only reasoning .*raise --max_new_tokens"),
    (body("<think>Hm</think>"), "only reasoning"),
    (body("Red. <think>Hm</think> Blue."), "only reasoning"),
    (body("Red.<|im_end|>\n<|im_start|>user"), r"token of a template \(<\|im_end"),
    (body("Red.</s>"), "token of a template"),
    (body("Red.<|eot_id|>"), "token of a template"),
    (body("[INST] Red."), "token of a template"),
    (body("Red.<｜end▁of▁sentence｜>"), "token of a template"),
    (body("Red.<end_of_turn>"), "token of a template"),
    (body("Your key is sk-very-secret"), "secret"),
    (body([{"type": "image_url"}]), "no text"),
    (body([1]), "no text"),
    (body(5), "no text"),
    (b'{"error": {"message": "overloaded"}}', r"error .*overloaded"),
    (b'{"error": "no model", "choices": [{"text": "Red.", "finish_reason": "stop"}]}', "error .*no model"),
    (b'{"choices": []}', "unreadable"),
    (b'{"choices": null}', "unreadable"),
    (b'{"choices": [null]}', "unknown finish_reason"),
    (b'{"choices": [{"message": null, "finish_reason": "stop"}]}', "empty"),
    (b"", "unreadable .*nothing"),
    (b"null", "unreadable"),
    (b"[]", "unreadable"),
    (b"\xff\xfe{", "unreadable"),
    (b"<html>Bad gateway", "unreadable .*Bad gateway"),
    (body("Red.")[:-9], "unreadable"),
    (b'{"choices":' + b"[" * 10**5 + b"]" * 10**5 + b"}", "unreadable"),
    (body("Red. " * 10**6), "too large"),
]


@pytest.mark.parametrize(("content", "reason"), NO_RESPONSE, ids=range(len(NO_RESPONSE)))
def test_anything_else_is_no_response_and_says_why(content, reason, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with pytest.raises(NoResponseError, match=f"^(?:{reason})") as caught:
        read_completion(content, STOPS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and "very-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error", "kind", "words"),
    [
        (400, {"message": "maximum context length is 4096"}, NoResponseError, "maximum context length is 4096"),
        (500, {"message": "exceeds the available context size"}, NoResponseError, "the available context size"),
        (400, {"message": "no", "code": "unsupported_parameter"}, InputError, "(no), expected settings"),
        (422, {"message": "Extra inputs are not permitted"}, InputError, "permitted), expected settings"),
        (429, {"message": "slow down"}, TemporaryError, "(slow down)"),
        (429, {"message": "no", "code": "insufficient_quota"}, InputError, "(no), expected an account with credit"),
        (503, "loading", TemporaryError, "(loading)"),
        (404, {"message": "no such model"}, InputError, "(no such model), expected a base_url"),
        (307, None, InputError, "expected a response"),
    ],
)
def test_an_error_says_what_it_is_about(status, error, kind, words):
    with pytest.raises(kind) as caught:
        check_status(status, json.dumps({"error": error}).encode())
    assert type(caught.value) is kind and f"status {status} (" in str(caught.value) and words in str(caught.value)


def test_a_status_may_stand_in_the_body():
    with pytest.raises(TemporaryError, match=r"status 429 \(wait\)"):
        check_status(200, b'{"error": {"code": 429, "message": "wait"}}')
    for code in (b"200", b'"x"', b"null", b"1e400", b"true"):
        check_status(200, b'{"error": {"code": %s}}' % code)


def test_what_a_server_says_is_one_line_without_a_secret_cut_in_two(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x1y2z3w4")
    words = shorten("a\n" + "b" * (MAX_WORDS - 6) + " x1y2z3w4 https://me:pass@host")
    assert "\n" not in words and len(words) == MAX_WORDS and "x1" not in words
    assert shorten("see https://me:pass@host/v1") == "see https://***@host/v1"
