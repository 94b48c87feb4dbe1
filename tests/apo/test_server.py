"""The client against a real server that fails in every way that servers do: all answers arrive, none twice."""

import argparse
import time

import pytest
from completion_server import CompletionServer

from apo import server as completion_client
from apo.cli import InputError
from apo.prompts import Prompt
from apo.server import CompletionClient, check_server_flags, complete_all

KEY = "sk-very-secret"


def ask(server: CompletionServer, num_prompts: int = 6, num_samples: int = 2, skip_refused=False, **options) -> dict:
    """Query id -> texts, of plain prompts "prompt 0", "prompt 1", ..."""
    client = CompletionClient(server.base_url, **{"timeout": 20, "max_retries": 4, **options})
    prompts = [Prompt(f"record {i + 1}", str(i), f"prompt {i}") for i in range(num_prompts)]
    requests = {
        p: [{"model": "m", "prompt": p.query, "max_tokens": 4, "seed": s} for s in range(num_samples)] for p in prompts
    }
    answers = []
    complete_all(
        client, requests, keep=lambda *answer: answers.append(answer), concurrency=3, skip_refused=skip_refused
    )
    assert len(answers) == len({prompt.query_id for prompt, _ in answers})
    return {prompt.query_id: [completion.text for completion in completions] for prompt, completions in answers}


FAILURES = ("429 1", "500", "503", "cut", "half", "no choices")


@pytest.fixture(scope="module")
def undisturbed(one_server) -> dict:
    return ask(one_server.reset())


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_asked_again_and_changes_no_answer(server, undisturbed, failure):
    server.failures = ["", failure, "", failure]
    assert ask(server) == undisturbed
    answered = sorted((body["prompt"], body["seed"]) for body in server.answered())
    assert answered == sorted((f"prompt {i}", s) for i in range(6) for s in range(2))
    assert len(server.requests) == 14


def test_a_server_that_does_not_answer_in_time_is_asked_again(server, undisturbed):
    server.failures = ["slow"]
    assert ask(server, timeout=1) == undisturbed
    assert len(server.requests) > 12


def test_waits_as_long_as_the_server_says(server):
    server.failures = ["429 1"]
    ask(server, num_prompts=1, num_samples=1)
    assert server.requests[1]["time"] - server.requests[0]["time"] >= 1


def test_concurrency_is_an_upper_limit(server, monkeypatch):
    now, most = 0, 0

    def complete(body: dict) -> str:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.05)
        now -= 1
        return "text"

    monkeypatch.setattr(server, "complete", complete)
    ask(server, num_prompts=9)
    assert most == 3


def test_the_key_is_sent_and_never_shown(server, caplog):
    caplog.set_level("DEBUG")
    server.failures = ["401"]
    with pytest.raises(InputError, match=r"status 401 .*\*\*\*.*expected OPENAI_API_KEY to hold a key") as caught:
        ask(server, num_prompts=1)
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None


def test_without_a_key_messages_stay_as_they_are(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server.failures = ["401"]
    with pytest.raises(InputError, match="you are Bearer none"):
        ask(server, num_prompts=1)


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        (["404"], "found status 404 .*the name of a model served there"),
        (["500"] * 9, "found status 500 .*after the retries"),
        (["half"] * 9, r"found an answer that cannot be read \(JSONDecodeError.* in 2 tries"),
        (["429 999"], "found status 429 "),
    ],
)
def test_what_no_retry_mends_is_one_line(server, failures, message):
    server.failures = failures
    with pytest.raises(InputError, match=message) as caught:
        ask(server, num_prompts=1, max_retries=1)
    assert "\n" not in str(caught.value) and "all answers so far are kept" in str(caught.value)


@pytest.mark.parametrize("failures", [["half"] * 9, ["half", "500"] * 9, ["500", "half"] * 9, ["500"] * 9])
def test_all_retries_are_counted_together(server, failures):
    server.failures = failures
    with pytest.raises(InputError, match="all answers so far are kept"):
        ask(server, num_prompts=1, max_retries=2)
    assert len(server.requests) == 3


def test_an_unreachable_server_is_one_line(server):
    client = CompletionClient("http://127.0.0.1:9/v1", timeout=5, max_retries=1)
    with pytest.raises(InputError, match=r"127.0.0.1:9/v1.*found no answer \(.*refused.*in 2 tries"):
        client.complete({"model": "m", "prompt": "p"})


def test_answers_under_way_at_a_failure_are_not_lost(server):
    """The second of three requests at a time fails for good: what was sent and answered comes, and little new is."""
    server.failures = ["slow", "404", "slow"]
    came = []
    with pytest.raises(InputError, match="404"):
        ask_twenty(server, lambda prompt, _: came.append(prompt.query))
    assert 2 <= len(came) == len(server.requests) - 1 < 10


def ask_twenty(server: CompletionServer, keep) -> None:
    client = CompletionClient(server.base_url, timeout=20, max_retries=0)
    prompts = [Prompt("", str(i), f"prompt {i}") for i in range(20)]
    requests = {p: [{"model": "m", "prompt": p.query, "max_tokens": 4}] for p in prompts}
    complete_all(client, requests, keep=keep, concurrency=3, skip_refused=False)


def test_answers_under_way_at_ctrl_c_are_kept(server, monkeypatch, caplog):
    """Interrupted after the first answer while the others take two seconds: all that was answered is kept."""
    server.failures = ["", "slow", "slow"]

    def interrupted(futures):
        yield next(as_completed(futures))
        raise KeyboardInterrupt

    as_completed = completion_client.as_completed
    monkeypatch.setattr(completion_client, "as_completed", interrupted)
    came = []
    with pytest.raises(KeyboardInterrupt):
        ask_twenty(server, lambda prompt, _: came.append(prompt.query))
    assert sorted(came) == sorted(request["body"]["prompt"] for request in server.requests)
    assert 3 <= len(came) < 20 and "interrupted: waiting for the answers under way" in caplog.text


def test_an_answer_that_cannot_be_kept_loses_no_other(server):
    server.failures = ["", "slow", "slow"]
    came = []

    def keep(prompt: Prompt, _: list) -> None:
        came.append(prompt.query)
        if len(came) == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ask_twenty(server, keep)
    assert 3 <= len(came) == len(server.requests) < 20


def test_a_refused_prompt_ends_the_run_and_is_named(server):
    server.refused_text = "prompt 4"
    with pytest.raises(InputError, match=r"record 5, id 4: the server refused it with status 400 .*--skip_refused"):
        ask(server)


def test_a_refused_prompt_can_be_skipped(server, undisturbed):
    server.refused_text = "prompt 4"
    assert ask(server, skip_refused=True) == {key: texts for key, texts in undisturbed.items() if key != "4"}


def test_chat_goes_to_the_chat_endpoint(server):
    client = CompletionClient(server.base_url, timeout=20, max_retries=0)
    request = {"model": "m", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4}
    completion = client.complete(request)
    assert server.requests[0]["path"] == "/v1/chat/completions"
    assert completion.is_truncated and (completion.prompt_tokens, completion.completion_tokens) == (7, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"concurrency": 0}, "--concurrency 0: expected a whole number of at least 1"),
        ({"max_retries": -1}, "--max_retries -1"),
        ({"timeout": 0.0}, "--timeout 0"),
        ({"base_url": None}, "found neither --base_url nor OPENAI_API_KEY"),
    ],
)
def test_wrong_flags_are_refused(flags, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    good = {"base_url": "http://a/v1", "concurrency": 1, "max_retries": 0, "timeout": 1.0}
    with pytest.raises(InputError, match=message):
        check_server_flags(argparse.Namespace(**{**good, **flags}))


@pytest.mark.parametrize("body", ["", "null", "[]", '"text"', "{}", '{"choices": [{}]}', '{"choices": [{"text": 1}]}'])
def test_a_body_that_is_no_answer_is_one_line(server, body):
    server.whole_body = body.encode()
    with pytest.raises(InputError, match="found an answer that cannot be read"):
        ask(server, num_prompts=1, max_retries=0)


def test_a_key_with_a_line_end_is_used_without_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    ask(server, num_prompts=1)
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX")
    with pytest.raises(InputError, match="OPENAI_API_KEY: found characters") as caught:
        ask(server, num_prompts=1)
    assert KEY not in str(caught.value)


def test_the_address_is_recorded_without_password(server):
    address = server.base_url.replace("http://", "http://me:secret@") + "/"
    assert CompletionClient(address, timeout=1, max_retries=0).base_url == server.base_url


def test_an_address_that_is_none_is_refused():
    with pytest.raises(InputError, match="--base_url http://"):
        CompletionClient("http://[::1", timeout=1, max_retries=0)
