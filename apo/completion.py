"""What a server sent: the text of a response, or the reason why it is none. Nothing here uses the network."""

from __future__ import annotations

import json
import re
from typing import Any

from apo.cli import InputError, describe, mask_secrets, secrets
from apo.prompts import REASONING_TAGS, format_response

MAX_BODY = 2 * 2**20  # bytes that are read of a body; 100,000 tokens need about 1 MB
MAX_WORDS = 300  # characters that a message shows of what the server said
UNFINISHED = ("content_filter", "abort", "error")  # values of finish_reason that are counted under their own name
TRUNCATED = "break off (finish_reason length): at --max_new_tokens, or at a limit of the server"
STRIPPED = "stripped of the reasoning or role before them"
OPEN, CLOSE = REASONING_TAGS
REASONING = re.compile(rf"(?:{OPEN})?(?:(?!{OPEN}).)*?{CLOSE}", re.DOTALL)  # some templates open it in the prompt
ROLE = re.compile(r"\s*(?i:assistant):")
TOKEN = re.compile(
    r"\A Human:|<[|｜]\w+|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|sep|pad|unk)>|</?tool_call>"
)
# What an error is about, in the words of OpenAI, vLLM, SGLang and llama.cpp.
TOO_LONG = re.compile(r"(?i)context (?:size|length|window)|(?:prompt|input) is too long|too many tokens")
WRONG_SETTING = re.compile(r"(?i)(?:unsupported|unknown|unrecognized|unexpected|extra)[ _](?:param|arg|val|field|inp)")
NO_CREDIT = re.compile(r"(?i)insufficient_quota|exceeded your current quota|credit balance")
KEY = "OPENAI_API_KEY to hold a key that it accepts, or --base_url a user and password"
EXPECTED = {401: KEY, 403: KEY, 404: "a base_url that usually ends in /v1, and the name of a model that it serves"}


class TemporaryError(Exception):
    """The server may respond to a later try."""


class NoResponseError(Exception):
    """What came is no response. Such prompts are counted by the `reason`; the text adds the server's own words."""

    def __init__(self, reason: str, words: str = "") -> None:
        super().__init__(f"{reason} ({words})" if words else reason)
        self.reason = reason


def shorten(words: Any) -> str:
    """Returns what a server said as one line of at most 300 characters, without secrets."""
    words = words if isinstance(words, str) else describe(words)
    return mask_secrets(" ".join(words.split())[: 99 * MAX_WORDS])[:MAX_WORDS]  # masked before it is cut


def _fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _parse(body: bytes) -> dict[str, Any]:
    try:
        return _fields(json.loads(body))
    except (ValueError, RecursionError):
        return {}


def _read_words(parsed: dict[str, Any], body: bytes) -> str:
    """Returns the message of an error, in the forms of OpenAI, vLLM and FastAPI; otherwise all that came."""
    error = parsed.get("error") or parsed
    messages = [error, *(_fields(error).get(name) for name in ("message", "detail")), body.decode(errors="replace")]
    return shorten(next(message for message in messages if isinstance(message, str))) or "nothing"


def check_status(status: int, body: bytes) -> None:
    """Returns for a success; the status of an error may stand in the body of a status 200.

    Raises:
        NoResponseError: an error about the prompt.
        TemporaryError: one that a later try may not meet.
        InputError: any other one.
    """
    parsed = _parse(body) if status >= 300 or b'"error"' in body else {}
    error = _fields(parsed.get("error"))
    if status < 300:
        status = error.get("code")
        if type(status) is not int or not 400 <= status < 600:
            return
    words = _read_words(parsed, body)
    found = f"status {status} ({words})"
    marks = f"{error.get('code')} {error.get('type')} {words}"
    expected = EXPECTED.get(status, "a response")
    if status in (400, 413, 422) or (status >= 500 and TOO_LONG.search(words)):
        if not WRONG_SETTING.search(marks):
            raise NoResponseError("refused", found)
        expected = "settings that it supports"
    elif NO_CREDIT.search(marks):
        expected = "an account with credit"
    elif status in (408, 409, 429) or status >= 500:
        raise TemporaryError(found)
    raise InputError(f"found {found}, expected {expected}")


def read_completion(body: bytes, stop_strings: tuple[str, ...]) -> tuple[str, list[str]]:
    """Returns the text of a response without the reasoning and the role before it, and what is odd about it.

    A response is a text that ends with finish_reason `stop` or, at the largest number of tokens, `length`, and holds
    more than white space and reasoning, no token of a template and no secret. `stop_strings` are where it will be cut.

    Raises:
        NoResponseError: anything else.
    """
    if len(body) >= MAX_BODY:
        raise NoResponseError("too large", f"more than {MAX_BODY:,} bytes")
    parsed = _parse(body)
    choices = parsed.get("choices")
    if parsed.get("error") or not choices or not isinstance(choices, list):
        reason = "error" if parsed.get("error") else "unreadable"
        raise NoResponseError(reason, f"expected the JSON of the OpenAI protocol, found {_read_words(parsed, body)}")
    choice = _fields(choices[0])
    message = _fields(choice.get("message", choice))
    finish_reason = choice.get("finish_reason")
    text = message.get("content", message.get("text"))
    if isinstance(text, list) and all(_fields(part).get("type") == "text" for part in text):
        text = "".join(str(part.get("text", "")) for part in text)
    if message.get("refusal"):
        raise NoResponseError("refusal", shorten(message["refusal"]))
    if message.get("tool_calls") or message.get("function_call"):
        raise NoResponseError("tool calls")
    if finish_reason not in ("stop", "length"):
        reason = finish_reason if finish_reason in UNFINISHED else "unknown finish_reason"
        raise NoResponseError(reason, f"finish_reason {shorten(finish_reason)}, content {shorten(text)}")
    if not isinstance(text, str | None):
        raise NoResponseError("no text", f"the content is {shorten(text)}")

    raw = text or ""
    reasoning = REASONING.match(raw.lstrip())
    text = raw.lstrip()[reasoning.end() :] if reasoning else raw
    text = text[role.end() :] if (role := ROLE.match(text)) else text
    response = format_response(text, stop_strings)
    has_reasoning = reasoning or message.get("reasoning_content") or message.get("reasoning")
    if re.search(f"{OPEN}|{CLOSE}", response) or (has_reasoning and not response):
        hint = "raise --max_new_tokens" if finish_reason == "length" else shorten(raw)
        raise NoResponseError("only reasoning", hint)
    if not response:
        raise NoResponseError("empty")
    if token := TOKEN.search(response):
        raise NoResponseError("token of a template", shorten(f"{token[0]} in {response}"))
    if any(secret in text for secret in secrets()):
        raise NoResponseError("secret", "the text holds a key or password of this machine")
    return text, [TRUNCATED] * (finish_reason == "length") + [STRIPPED] * (text != raw)
