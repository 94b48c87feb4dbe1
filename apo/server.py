"""Completions from a server that speaks the OpenAI protocol (vLLM, SGLang, OpenAI): asked many at a time, and again
where that can help.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from apo.cli import InputError, describe
from apo.prompts import Prompt

logger = logging.getLogger(__name__)

REFUSED_PROMPT = (400, 413, 422)  # HTTP statuses that are about this one request
MAX_BACKOFF = 8.0  # seconds
MAX_REASON = 300  # characters of a server's own words
NO_KEY = "none"  # servers of one's own ask for no key, the client's library does
KEPT = "all answers so far are kept: the same command goes on from there"


class RefusedPromptError(InputError):
    """The server will not answer this prompt, whenever it is asked: too long, against its rules, a wrong setting."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back for one request."""

    text: str
    is_truncated: bool  # at the largest number of new tokens
    prompt_tokens: int
    completion_tokens: int
    num_retries: int


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which server to ask, and how."""
    server = parser.add_argument_group(
        "server", "the key, if it wants one, comes from OPENAI_API_KEY and is never shown"
    )
    server.add_argument(
        "--base_url", help="for example http://localhost:8000/v1 (default: OPENAI_BASE_URL, else OpenAI)"
    )
    server.add_argument("--concurrency", type=int, default=16, help="requests at a time (default: 16)")
    server.add_argument("--timeout", type=float, default=600, help="seconds that one try may take (default: 600)")
    server.add_argument(
        "--max_retries", type=int, default=8, help="tries after the first, further and further apart (8)"
    )
    server.add_argument(
        "--skip_refused",
        action="store_true",
        help="leave out and name prompts that the server refuses, such as too long ones, instead of ending the run; "
        "the next run asks them again",
    )


def check_server_flags(args: argparse.Namespace) -> None:
    """Refuses values that cannot work.

    Raises:
        InputError: with flag, value and what is expected.
    """
    for name, least in (("concurrency", 1), ("max_retries", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: expected a whole number of at least {least}")
    if not args.timeout > 0:
        raise InputError(f"--timeout {args.timeout:g}: expected a positive number of seconds")
    if not (args.base_url or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_KEY")):
        raise InputError("found neither --base_url nor OPENAI_API_KEY in the environment, expected one of them")


class CompletionClient:
    """Asks an OpenAI-compatible server, again where that can help."""

    def __init__(self, base_url: str | None, *, timeout: float, max_retries: int) -> None:
        import openai

        for name in ("openai", "httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # a line a request otherwise
        self._openai = openai
        self._key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
        if not (self._key.isascii() and self._key.isprintable()):  # the error of the HTTP library would show it
            raise InputError("OPENAI_API_KEY: found characters that no key has, expected printable ASCII")
        self._max_retries = max_retries
        try:
            self._client = openai.OpenAI(
                base_url=base_url, api_key=self._key, timeout=timeout, max_retries=max_retries
            )
        except Exception as error:  # the kinds that its HTTP library has for an address it cannot read
            raise InputError(f"--base_url {base_url}: found no web address ({error}), expected http://...") from error

    @property
    def base_url(self) -> str:
        """The server's address, without a password that may stand in it."""
        url = self._client.base_url
        return f"{url.scheme}://{url.netloc.decode()}{url.path}".rstrip("/")

    def complete(self, request: Mapping[str, Any]) -> Completion:
        """Sends one request, to the chat endpoint if it has messages.

        Connections that fail or break off, time-outs, and the statuses 408, 409, 429 and 5xx are tried again by the
        library, with exponential back-off and jitter, or after as long as the server says; answers that are no JSON,
        or not of the right form, by us. Both count against the same `max_retries`.

        Raises:
            RefusedPromptError: status 400, 413 or 422.
            InputError: any other failure, after the retries.
        """
        num_tries = 0  # whose answers could not be read, and those before them
        while num_tries <= self._max_retries:
            client = self._client.with_options(max_retries=self._max_retries - num_tries)
            endpoint = client.chat.completions if "messages" in request else client.completions
            try:
                raw = endpoint.with_raw_response.create(**request)
            except self._openai.APIError as error:
                raise self._input_error(error) from None  # the library's own error holds the key
            try:
                return _parse_completion(raw.http_response.text, num_tries + raw.retries_taken)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                found = f"{type(error).__name__}: {error}"
            num_tries += raw.retries_taken + 1
            if num_tries <= self._max_retries:
                time.sleep(min(0.5 * 2 ** (num_tries - 1), MAX_BACKOFF) * random.uniform(0.75, 1))
        raise InputError(
            f"{self.base_url}: found an answer that cannot be read ({found}) in {num_tries} tries, "
            f"expected the JSON of the OpenAI protocol; {KEPT}"
        )

    def _input_error(self, error: Exception) -> InputError:
        status = getattr(error, "status_code", None)
        reason = str((status is None and error.__cause__) or error)
        if self._key != NO_KEY:
            reason = reason.replace(self._key, "***")
        reason = " ".join(reason.split())[:MAX_REASON]
        if status in REFUSED_PROMPT:
            return RefusedPromptError(f"status {status} ({reason})")
        if status is None:
            hint = f"in {self._max_retries + 1} tries, expected a running server there"
        elif status in (401, 403):
            hint = "expected OPENAI_API_KEY to hold a key that it accepts"
        elif status == 404:
            hint = "expected a base_url that ends in /v1 as a rule, and the name of a model served there"
        else:
            hint = "after the retries, expected an answer"
        found = "no answer" if status is None else f"status {status}"
        return InputError(f"{self.base_url}: found {found} ({reason}) {hint}; {KEPT}")


def _parse_completion(body: str, num_retries: int) -> Completion:
    """Reads the body of an answer; raises ValueError, LookupError, TypeError or AttributeError if it is none."""
    answer = json.loads(body)
    choice = answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if not isinstance(text, str | None):
        raise TypeError(f"the text is {describe(text)}")
    usage = answer.get("usage") or {}
    return Completion(
        text=text or "",
        is_truncated=choice.get("finish_reason") == "length",
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        num_retries=num_retries,
    )


def complete_all(
    client: CompletionClient,
    requests: Mapping[Prompt, list[dict[str, Any]]],
    *,
    keep: Callable[[Prompt, list[Completion]], None],
    concurrency: int,
    skip_refused: bool,
) -> None:
    """Sends the requests of many prompts, those of one prompt one after another.

    After a failure, and on Ctrl-C, no new prompt is begun; those under way are waited for and kept.

    Args:
        requests: prompt -> its requests, one a response.
        keep: is given each prompt with its completions as soon as it has them all, in any order, one at a time. It
            runs in the thread that asked, where no Ctrl-C comes between answer and disk.
        concurrency: prompts, and so requests, at a time.
        skip_refused: a refused prompt is named and passed over instead of ending the run.

    Raises:
        InputError: the server gave up on us, or refused a prompt.
    """
    lock = threading.Lock()

    def ask(prompt: Prompt) -> None:
        completions = [client.complete(request) for request in requests[prompt]]
        with lock:
            keep(prompt, completions)

    pool = ThreadPoolExecutor(concurrency)
    try:
        prompts = {pool.submit(ask, prompt): prompt for prompt in requests}
        for future in as_completed(prompts):
            prompt, error = prompts[future], future.exception()
            if isinstance(error, RefusedPromptError) and skip_refused:
                logger.warning("%s, id %s: refused with %s", prompt.place, prompt.query_id, error)
            elif error is not None:
                raise _name_prompt(error, prompt)
    except KeyboardInterrupt:
        logger.warning("interrupted: waiting for the answers under way, which are kept")
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _name_prompt(error: BaseException, prompt: Prompt) -> BaseException:
    if not isinstance(error, RefusedPromptError):
        return error
    return InputError(
        f"{prompt.place}, id {prompt.query_id}: the server refused it with {error}; mend it, or leave out such "
        f"prompts with --skip_refused; {KEPT}"
    )
