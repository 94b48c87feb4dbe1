"""Completions from a server that speaks the OpenAI protocol (vLLM, SGLang, OpenAI): asked many at a time, and again
where that can help.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from preference_records import InputError, describe
from responses import Prompt

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
    is_cut: bool  # at the largest number of new tokens
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
        help="leave out and name prompts that the server refuses, such as too long ones, instead of ending the run",
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

    def complete(self, request: Mapping[str, Any]) -> Completion:
        """Sends one request, to the chat endpoint if it has messages.

        Connections that fail or break off, time-outs, and the statuses 408, 409, 429 and 5xx are tried again by the
        library, with exponential back-off and jitter, or after as long as the server says; answers that are no JSON,
        or not of the right form, by us.

        Raises:
            RefusedPromptError: status 400, 413 or 422.
            InputError: any other failure, after the retries.
        """
        endpoint = self._client.chat.completions if "messages" in request else self._client.completions
        for attempt in range(self._max_retries + 1):
            try:
                raw = endpoint.with_raw_response.create(**request)
            except self._openai.APIError as error:
                raise self._input_error(error) from None  # the library's own error holds the key
            try:
                return _parse_completion(raw.http_response.text, raw.retries_taken + attempt)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                found = f"{type(error).__name__}: {error}"
            if attempt < self._max_retries:
                time.sleep(min(0.5 * 2**attempt, MAX_BACKOFF) * random.uniform(0.75, 1))
        raise InputError(
            f"{self._client.base_url}: found an answer that cannot be read ({found}) {self._max_retries + 1} times, "
            f"expected the JSON of the OpenAI protocol; {KEPT}"
        )

    def _input_error(self, error: Exception) -> InputError:
        status = getattr(error, "status_code", None)
        reason = str((status is None and error.__cause__) or error).replace(self._key, "***")
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
        return InputError(f"{self._client.base_url}: found {found} ({reason}) {hint}; {KEPT}")


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
        is_cut=choice.get("finish_reason") == "length",
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        num_retries=num_retries,
    )


def complete_all(
    client: CompletionClient,
    requests: Mapping[Prompt, list[dict[str, Any]]],
    *,
    concurrency: int,
    skip_refused: bool,
) -> Iterator[tuple[Prompt, list[Completion]]]:
    """Sends the requests of many prompts, those of one prompt one after another.

    Args:
        requests: prompt -> its requests, one a response.
        concurrency: prompts, and so requests, at a time.
        skip_refused: a refused prompt comes back without completions instead of ending the run.

    Yields:
        Prompt and completions as they arrive, in any order. After a failure no new prompt is begun; those under way
        are waited for and yielded before the error is raised.

    Raises:
        InputError: the server gave up on us, or refused a prompt.
    """
    failure: InputError | None = None
    with ThreadPoolExecutor(concurrency) as pool:
        prompts = {pool.submit(lambda rs: [client.complete(r) for r in rs], rs): p for p, rs in requests.items()}
        try:
            for future in as_completed(prompts):
                if future.cancelled():
                    continue
                prompt, error = prompts[future], future.exception()
                if error is None:
                    yield prompt, future.result()
                elif isinstance(error, RefusedPromptError) and skip_refused:
                    logger.warning("%s, id %s: refused with %s", prompt.place, prompt.query_id, error)
                    yield prompt, []
                elif isinstance(error, InputError):
                    failure = failure or _named(error, prompt)
                    _cancel(prompts)
                else:
                    raise error
        finally:
            _cancel(prompts)
    if failure:
        raise failure


def _cancel(futures: Iterable[Future]) -> None:
    """Takes back what has not begun."""
    for future in futures:
        future.cancel()


def _named(error: InputError, prompt: Prompt) -> InputError:
    if not isinstance(error, RefusedPromptError):
        return error
    return InputError(
        f"{prompt.place}, id {prompt.query_id}: the server refused it with {error}; mend it, or leave out such "
        f"prompts with --skip_refused; {KEPT}"
    )
