"""What counts as a response, and what an error is about."""

import json

import pytest

from apo.completion import MAX_WORDS, NoResponseError, read_completion, read_error, shorten

STOPS = ("\nHuman:",)


def body(content: object, finish_reason: object = "stop", **fields: object) -> bytes:
    choice = {"message": {"content": content, **fields}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}).encode()


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
    found, usage = read_completion(body(content, reasoning_content="Hm."), STOPS)
    assert found == text
    assert usage == {
        "responses": 1,
        "truncated": 0,
        "truncated_tokens": 0,
        "stripped": content != text and isinstance(content, str),
        "prompt_tokens": 7,
        "completion_tokens": 3,
    }


def test_length_is_a_response_and_counted():
    text, usage = read_completion(b'{"choices": [{"text": "Re", "finish_reason": "length"}], "usage": {}}', STOPS)
    assert (text, usage["truncated"], usage["truncated_tokens"], usage["completion_tokens"]) == ("Re", 1, 0, 0)


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
    (b'{"choices": []}', "no choices"),
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
    ("status", "error", "about"),
    [
        (400, {"message": "maximum context length is 4096"}, "prompt"),
        (500, {"message": "exceeds the available context size"}, "prompt"),
        (400, {"message": "no", "code": "unsupported_parameter"}, "setting"),
        (422, {"message": "Extra inputs are not permitted"}, "setting"),
        (429, {"message": "slow down"}, "temporary"),
        (429, {"message": "no", "code": "insufficient_quota"}, "credit"),
        (503, "loading", "temporary"),
        (404, {"message": "no such model"}, "server"),
        (307, None, "server"),
    ],
)
def test_an_error_says_what_it_is_about(status, error, about):
    expected = error["message"] if isinstance(error, dict) else error
    assert read_error(status, json.dumps({"error": error}).encode())[:2] == (status, about)
    assert expected is None or read_error(status, json.dumps({"error": error}).encode())[2] == expected


def test_a_status_may_stand_in_the_body():
    assert read_error(200, b'{"error": {"code": 429, "message": "wait"}}') == (429, "temporary", "wait")
    for code in (b"200", b'"x"', b"null", b"1e400", b"true"):
        assert read_error(200, b'{"error": {"code": %s}}' % code) is None


def test_what_a_server_says_is_one_line_without_a_secret_cut_in_two(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x1y2z3w4")
    words = shorten("a\n" + "b" * (MAX_WORDS - 6) + " x1y2z3w4 https://me:pass@host")
    assert "\n" not in words and len(words) == MAX_WORDS and "x1" not in words
    assert shorten("see https://me:pass@host/v1") == "see https://***@host/v1"
