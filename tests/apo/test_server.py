"""The engine with a real server that fails in many ways: all responses arrive, none twice."""

import argparse
import json
import os
import signal
import threading
import time
import zlib

import pytest
from completion_server import SLOW, CompletionServer

from apo import server as server_module
from apo.cli import InputError
from apo.completion import TRUNCATED
from apo.generation import BrokenOff
from apo.prompts import Prompt
from apo.server import RETRIED, ServerEngine, retry_delay

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("apo.server.RETRY_DELAY", 0.01)


def make_engine(server: CompletionServer, num_prompts=6, rendered=str, num_samples=2, **flags) -> ServerEngine:
    """An engine for "prompt 0", "prompt 1", ..."""
    prompts = [Prompt(f"record {i + 1}", str(i), f"prompt {i}") for i in range(num_prompts)]
    default = {"base_url": server.base_url, "concurrency": 3, "timeout": 20, "max_retries": 4, "skip_refused": False}
    default["seed"] = 1
    body = {"model": "m", "max_tokens": 4}
    flags = argparse.Namespace(**default | flags)
    return ServerEngine({p: rendered(p.query) for p in prompts}, body, flags, num_samples)


def run(engine: ServerEngine) -> dict[str, list[str]]:
    """Query id -> texts."""
    kept = []
    engine.generate(engine.share, lambda *prompt_and_texts: kept.append(prompt_and_texts))
    assert len(kept) == len({prompt.query_id for prompt, _ in kept})
    return {prompt.query_id: texts for prompt, texts in kept}


@pytest.fixture(scope="module")
def undisturbed(one_server) -> dict:
    return run(make_engine(one_server.reset()))


def test_temporary_failures_are_retried_and_change_no_response(server, undisturbed):
    server.failures = ["429", "", "500", "503", "cut", "", "cut"]
    engine = make_engine(server)
    assert run(engine) == undisturbed
    assert len({(body["prompt"], body["seed"]) for body in server.completed()}) == len(server.completed()) == 12
    assert len(server.requests) == 17
    assert engine.remarks == {TRUNCATED: 12, RETRIED: 5}
    assert all(isinstance(text, BrokenOff) for texts in undisturbed.values() for text in texts)


def test_a_request_that_takes_too_long_is_retried(server, undisturbed):
    server.failures = ["slow"]
    assert run(make_engine(server, timeout=SLOW / 2)) == undisturbed
    assert len(server.requests) > 12
    time.sleep(SLOW)  # until the server has done with the request that was given up


def test_concurrency_is_an_upper_limit(server, monkeypatch):
    lock, now, most = threading.Lock(), 0, 0

    def complete(body: dict) -> str:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return "text"

    monkeypatch.setattr(server, "complete", complete)
    run(make_engine(server))
    assert most == 3


@pytest.mark.parametrize(
    ("failure", "message", "num_requests"),
    [
        ("404", "found status 404 .*the name of a model that it serves", 1),
        ("500", "found status 500 .* after 2 retries", 3),
    ],
)
def test_a_permanent_failure_is_one_line(server, failure, message, num_requests):
    server.failures = [failure] * 9
    with pytest.raises(InputError, match=message) as caught:
        run(make_engine(server, num_prompts=1, max_retries=2))
    assert "\n" not in str(caught.value) and "all responses so far are kept" in str(caught.value)
    assert len(server.requests) == num_requests


def test_an_unreachable_server_is_one_line(server):
    engine = make_engine(server, num_prompts=1, base_url="http://127.0.0.1:9/v1", max_retries=1)
    with pytest.raises(InputError, match=r"127.0.0.1:9/v1.*found no response \(.*fail.*expected a server that runs"):
        run(engine)


def test_the_key_is_sent_and_never_shown(server, caplog, monkeypatch):
    """A line end after it, as files have, is no part of it."""
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    server.failures = ["401"]
    with pytest.raises(InputError, match=r"status 401 .*\*\*\*.*expected OPENAI_API_KEY to hold a key") as caught:
        run(make_engine(server, num_prompts=1))
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert caught.value.__cause__ is None
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX")
    with pytest.raises(InputError, match="OPENAI_API_KEY: found characters") as other:
        make_engine(server)
    assert KEY not in str(caught.value) + str(other.value) + caplog.text


def test_without_a_key_messages_are_unchanged(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server.failures = ["401"]
    with pytest.raises(InputError, match="you are Bearer none"):
        run(make_engine(server, num_prompts=1))


# ------------------------------------------------------------------------------------------------ interruptions


def run_twenty(server: CompletionServer, keep) -> None:
    engine = make_engine(server, num_prompts=20, num_samples=1, max_retries=0)
    engine.generate(engine.share, keep)


def test_requests_in_progress_at_a_failure_are_kept(server):
    """The second of three requests at a time fails for good."""
    server.failures = ["slow", "404", "slow"]
    kept = []
    with pytest.raises(InputError, match="404"):
        run_twenty(server, lambda prompt, _: kept.append(prompt.query))
    assert 2 <= len(kept) == len(server.requests) - 1 < 20


def test_requests_in_progress_at_ctrl_c_are_kept(server, caplog):
    """Interrupted at the first response, while others are slow."""
    server.failures = ["", "slow", "slow"]
    kept = []

    def keep(prompt: Prompt, _: list) -> None:
        if not kept:
            os.kill(os.getpid(), signal.SIGINT)
        kept.append(prompt.query)

    with pytest.raises(KeyboardInterrupt, match="all responses so far are kept"):
        run_twenty(server, keep)
    assert sorted(kept) == sorted(request["body"]["prompt"] for request in server.requests)
    assert 3 <= len(kept) < 20 and "interrupted: waiting for the requests in progress" in caplog.text


def test_a_response_that_cannot_be_kept_loses_no_other(server):
    server.failures = ["", "slow", "slow"]
    seen = []

    def keep(prompt: Prompt, _: list) -> None:
        seen.append(prompt.query)
        if len(seen) == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_twenty(server, keep)
    assert 3 <= len(seen) == len(server.requests) < 20


# ------------------------------------------------------------------------------------------------ prompts


def test_a_refused_prompt_ends_the_run_or_is_skipped(server, undisturbed, caplog):
    server.refused_text = "prompt 4"
    with pytest.raises(InputError, match=r"record 5, id 4: refused \(status 400 .*--skip_refused"):
        run(make_engine(server))
    expected = {key: texts for key, texts in undisturbed.items() if key != "4"}
    assert run(make_engine(server, skip_refused=True)) == expected
    assert "record 5, id 4: no response: refused (status 400" in caplog.text


def test_messages_go_to_the_chat_endpoint(server):
    engine = make_engine(server, num_prompts=1, rendered=lambda text: [{"role": "user", "content": text}])
    [texts] = run(engine).values()
    assert len(set(texts)) == 2
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert server.requests[0]["body"]["messages"] == [{"role": "user", "content": "prompt 0"}]


# ------------------------------------------------------------------------------------------------ hostile servers

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MEGABYTE = b"100000\r\n" + b" " * 2**20 + b"\r\n"


def forever(start: bytes, piece: bytes, pause: float = 0.0):
    """Writes until the client has had enough; the server then has an error, which it ignores."""

    def write(file) -> None:
        file.write(start)
        for _ in range(10**6):
            file.write(piece)
            time.sleep(pause)

    return write


def gzip_bomb(file) -> None:
    """A gigabyte of spaces in a megabyte."""
    packer = zlib.compressobj(9, wbits=31)
    file.write(OK + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n")
    for _ in range(1024):
        file.write(packer.compress(b" " * 2**20))


def once(data: bytes):
    return lambda file: file.write(data)


HOSTILE = {
    "bytes of the body now and then": (forever(CHUNKED, b"1\r\n \r\n", 0.05), "TimeoutError"),
    "bytes of a header now and then": (forever(OK + b"X: ", b"x", 0.05), "TimeoutError"),
    "headers without end": (forever(OK, b"X: " + b"x" * 999 + b"\r\n"), "no response"),
    "one header without end": (forever(OK + b"X: ", b"x" * 999), "no response"),
    "interim responses without end": (forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "TimeoutError"),
    "nothing at all": (forever(b"", b"", 0.05), "TimeoutError"),
    "a body without end": (forever(CHUNKED, MEGABYTE), "too large"),
    "a compressed gigabyte": (gzip_bomb, "too large"),
    "an error without end": (forever(CHUNKED.replace(b"200 OK", b"400 No"), MEGABYTE), "status 400"),
    "a closed connection": (once(b""), "no response"),
    "no HTTP": (once(b"220 smtp ready\r\n"), "no response"),
    "a length that is no number": (once(OK + b"Content-Length: x\r\n\r\n{}"), "no response"),
    "a negative length": (once(OK + b"Content-Length: -1\r\n\r\n{}"), "no response"),
    "two lengths": (once(OK + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}"), "no response"),
    "a bad chunk": (once(CHUNKED + b"zz\r\n{}\r\n"), "no response"),
    "no gzip": (once(OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"), "no response"),
    "a redirect": (once(b"HTTP/1.1 307 Go\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"), "status 307"),
    "no content": (once(b"HTTP/1.1 204 No\r\n\r\n"), "unreadable"),
    "deep JSON": (once(OK + b"Connection: close\r\n\r\n" + b"[" * 10**5 + b"]" * 10**5), "unreadable"),
    "a web page": (once(OK + b"Connection: close\r\n\r\n<html>"), "unreadable"),
    "a stream of events": (once(OK + b"Connection: close\r\n\r\ndata: {}\n\ndata: [DONE]"), "unreadable"),
}


@pytest.mark.parametrize(("hostile", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_server_is_named_in_time(server, caplog, hostile, words):
    server.hostile = hostile
    engine = make_engine(server, num_prompts=1, timeout=1 if words == "TimeoutError" else 20, max_retries=0)
    began = time.monotonic()
    try:
        assert run(engine) == {}
        message = caplog.text
    except InputError as error:
        message = str(error)
    assert words in message and time.monotonic() - began < 8
    server.hostile = once(b"")  # ends what is left


def test_reasons_are_named_once_and_counted(server, caplog):
    server.whole_body = b'{"choices": []}'
    engine = make_engine(server)
    assert run(engine) == {} and engine.missing == {"unreadable": 6}
    assert caplog.text.count("no response: unreadable") == 1


@pytest.mark.parametrize("wish", ["0.3", "1e9", "nan", "inf", "-5", "Wed, 21 Oct 2099 07:28:00 GMT", "soon", None])
def test_the_next_try_comes_when_the_server_wishes_within_limits(monkeypatch, wish):
    """Without a wish after 0.5 s, less up to a quarter."""
    monkeypatch.setattr(server_module, "RETRY_DELAY", 0.1)
    delay = retry_delay(0, wish)
    expected = {"0.3": (0.3, 0.3), "1e9": (60, 60), "inf": (60, 60)}.get(wish, (0.075, 0.1))
    assert expected[0] <= delay <= expected[1]
    assert 6 <= retry_delay(9999, None) <= 8


def test_no_retry_where_none_can_help(server):
    """Also an error with status 200; a wrong setting is said to be one, whatever the flag for refused prompts."""
    for error, words in (
        ({"code": "insufficient_quota", "message": "no money"}, r"status 429 \(no money\), expected an account with"),
        ({"code": 401, "message": "who?"}, r"status 401 \(who\?\), expected OPENAI_API_KEY"),
        ({"code": 400, "message": "Unsupported parameter: 'x'"}, "expected settings that it supports"),
    ):
        server.reset().whole_body = json.dumps({"error": error}).encode()
        server.failures = ["429"] if "money" in words else []
        with pytest.raises(InputError, match=words):
            run(make_engine(server, num_prompts=1, skip_refused=True))
        assert len(server.requests) == 1


# ------------------------------------------------------------------------------------------------ flags


def test_a_password_in_the_address_is_sent_and_never_shown(server, caplog, monkeypatch):
    """Nor does the key that is not sent then; "me:se/cret!" is bWU6c2UvY3JldCE= in base64."""
    monkeypatch.setattr("apo.cli.hidden", hidden := set())
    monkeypatch.setattr(server_module, "hidden", hidden)
    address = server.base_url.replace("http://", "http://me:se%2Fcret!@") + "/"
    engine = make_engine(server, base_url=address, num_prompts=1)
    assert engine.notes == {"base_url": server.base_url} and "OPENAI_API_KEY is not sent" in caplog.text
    server.failures = ["401"]
    with pytest.raises(InputError, match=r"status 401 .*you are Basic \*\*\*") as caught:
        run(engine)
    assert server.requests[0]["headers"]["Authorization"] == "Basic bWU6c2UvY3JldCE="
    server.reset().complete = lambda body: "se/cret! bWU6c2UvY3JldCE="
    assert run(make_engine(server, base_url=address, num_prompts=1)) == {}
    del server.complete
    assert "cret!" not in str(caught.value) + caplog.text and "bWU6" not in str(caught.value) + caplog.text


def test_a_bad_address_is_refused(server):
    with pytest.raises(InputError, match="--base_url http://"):
        make_engine(server, base_url="http://[::1")
