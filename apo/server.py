"""Responses from an OpenAI-compatible server (vLLM, SGLang, OpenAI), many requests at a time.

What can be retried is retried: failed connections, time-outs, and the statuses 408, 409, 429 and 5xx. The client is
httpx2 and not openai, which has no limit for the time of a whole request or for the size of an error.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from apo.cli import InputError, at_least, hidden
from apo.completion import MAX_BODY, NoResponseError, read_completion, read_error, shorten
from apo.generation import derive_seed
from apo.prompts import Prompt

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
RETRY_DELAY = 0.5  # seconds before the first retry, doubled for each further one up to
MAX_RETRY_DELAY = 8.0
MAX_RETRY_AFTER = 60.0  # what a server may ask for
RETRY_LINE = 5.0  # seconds between two lines about retries
NUM_HOPELESS = 20  # prompts without a response, before the first one with, that end a run
KEPT = "all responses so far are kept: the same command resumes"


class RefusedPromptError(InputError):
    """The server will never accept this prompt: it is too long, or against the server's rules."""


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a server."""
    group = parser.add_argument_group("server", "a key, if needed, is read from OPENAI_API_KEY and never shown")
    add = group.add_argument
    add("--base_url", help="for example http://localhost:8000/v1 (default: OPENAI_BASE_URL, else OpenAI)")
    add("--concurrency", type=at_least(1), default=16, help="requests at a time (default: 16)")
    add("--timeout", type=at_least(0.1), default=600, help="seconds that one try may take in all (default: 600)")
    help_text = "of a request, after up to 8 seconds, or up to 60 if Retry-After asks for them (default: 8)"
    add("--max_retries", type=at_least(0), default=8, help=help_text)
    add(
        "--skip_refused",
        action="store_true",
        help="leave out and name prompts that the server refuses, such as too long ones, instead of ending the run; "
        "end with status 0 although prompts have no response; the next run asks for these again",
    )


class ServerEngine:
    """An `apo.generation.Engine` with an OpenAI-compatible server.

    `usage` counts `responses`, those `truncated` (finish_reason `length`) and their `truncated_tokens`, `retries`,
    those `stripped` of reasoning or role, and the server's own `prompt_tokens` and `completion_tokens`, of the prompts
    that were kept; `missing` counts the others by the reason.
    """

    def __init__(
        self,
        rendered: dict[Prompt, Any],
        body: dict[str, Any],
        flags: argparse.Namespace,
        num_samples: int,
        stop_strings: tuple[str, ...] = (),
    ) -> None:
        """Makes the client; connects to no server yet.

        Args:
            rendered: prompt -> its text, or the messages of a chat.
            body: the fields of all requests, but for prompt and seed.
            flags: those of `add_server_flags`, and the `seed` of the run; without one requests have no seed.
            num_samples: responses of a prompt, each one request.
            stop_strings: where responses will be cut.

        Raises:
            InputError: no server is named, or the address or the key cannot be one.
        """
        import httpx2

        key = os.environ.get("OPENAI_API_KEY", "").strip()
        address = flags.base_url or os.environ.get("OPENAI_BASE_URL") or (OPENAI if key else "")
        if not address:
            raise InputError("found neither --base_url nor OPENAI_API_KEY in the environment, expected one of them")
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # otherwise one line per request
        if not (key.isascii() and key.isprintable()):  # the error of the HTTP library would show it
            raise InputError("OPENAI_API_KEY: found characters that no key has, expected printable ASCII")
        try:
            url = httpx2.URL(address)
            if url.scheme not in ("http", "https") or not url.host:
                raise ValueError("no such address")
        except (httpx2.InvalidURL, ValueError):  # without its words and what is before the @: it may be a password
            raise InputError(f"--base_url {address.rpartition('@')[2]}: expected http://... or https://...") from None
        authorization = f"Bearer {key or 'none'}"  # local servers need no key
        if url.userinfo:
            login = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
            hidden.update((url.password, url.userinfo.decode(), login.rstrip("=")))
            authorization = f"Basic {login}"
            if key:
                logger.warning("--base_url holds a user: it is sent with its password, OPENAI_API_KEY is not sent")
        headers = {"Authorization": authorization, "Content-Type": "application/json"}
        limits = httpx2.Limits(max_keepalive_connections=flags.concurrency)
        self._client = httpx2.AsyncClient(headers=headers, timeout=None, limits=limits)
        self._loop = asyncio.new_event_loop()  # a request can be ended after a time only there
        self._failures = (httpx2.RequestError, asyncio.TimeoutError, OSError)
        self._rendered, self._body, self._flags, self._num_samples = rendered, body, flags, num_samples
        self._stop_strings = stop_strings
        self._ending, self._lock, self._next_line = threading.Event(), threading.Lock(), 0.0
        self.usage: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.base_url = f"{url.scheme}://{url.netloc.decode()}{url.path}".rstrip("/")  # without a password
        self.settings: dict[str, Any] = {}
        self.notes = {"base_url": self.base_url}
        self.share = list(rendered)

    def generate(self, prompts: list[Prompt], keep: Callable[[Prompt, list[str]], None]) -> None:
        """See `Engine`. After a failure or Ctrl-C no new prompt is sent; requests in progress are completed and kept.

        A second Ctrl-C gives them up.

        Raises:
            InputError: a request failed after its retries, the server refused a prompt, or none of the first 20
                prompts of all has a response.
        """

        def respond(prompt: Prompt) -> None:
            try:
                responses = [self._request(prompt, sample) for sample in range(self._num_samples)]
            except (NoResponseError, RefusedPromptError) as error:
                error.__traceback__ = None  # it holds the parsed body, maybe 100 MB, while others wait
                self._count_missing(prompt, error)
                return
            with self._lock:  # in the thread of the request: Ctrl-C cannot come between the response and the disk
                keep(prompt, [text for text, _ in responses])
                self._has_none = False
                self.usage += sum((usage for _, usage in responses), Counter())

        self._has_none = len(prompts) == len(self._rendered)  # neither this run nor an earlier one has a response
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        pool = ThreadPoolExecutor(self._flags.concurrency)
        try:
            for future in as_completed([pool.submit(respond, prompt) for prompt in prompts]):
                future.result()
        except KeyboardInterrupt as interrupt:
            logger.warning("interrupted: waiting for the requests in progress, whose responses are kept")
            raise type(interrupt)(KEPT) from None
        finally:
            self._ending.set()  # no further retries
            try:
                pool.shutdown(cancel_futures=True)
            except KeyboardInterrupt as interrupt:
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self._loop)])
                raise type(interrupt)(KEPT) from None
        if self.usage["stripped"]:
            logger.warning("%d responses stripped of the reasoning or role before them", self.usage["stripped"])
        if num := self.usage["truncated"]:
            limit = self._body.get("max_tokens", self._body.get("max_completion_tokens"))
            mean = self.usage["truncated_tokens"] / num
            tokens = f" after {mean:.0f} tokens on average" if mean else ""  # not every server counts them
            logger.warning("%d responses break off (finish_reason length)%s; --max_new_tokens: %s", num, tokens, limit)

    def _count_missing(self, prompt: Prompt, error: NoResponseError | RefusedPromptError) -> None:
        """Counts a prompt without a response, and names the first one of each reason."""
        place = f"{prompt.place}, id {prompt.query_id}"
        if isinstance(error, RefusedPromptError) and not self._flags.skip_refused:
            raise InputError(
                f"{place}: the server refused it with {error}; fix it, or leave out such prompts with "
                f"--skip_refused; {KEPT}"
            )
        reason = getattr(error, "reason", "refused")
        with self._lock:
            self.missing[reason] += 1
            if self.missing[reason] == 1:
                logger.warning("%s: no response: %s; further ones are counted", place, error)
            if self.missing.total() >= NUM_HOPELESS and self._has_none:
                raise InputError(f"the first {NUM_HOPELESS} prompts have no response, the last is {place}: {error}")

    def _request(self, prompt: Prompt, sample: int) -> tuple[str, Counter[str]]:
        """Returns the text and the usage of one response."""
        rendered = self._rendered[prompt]
        path, name = ("completions", "prompt") if isinstance(rendered, str) else ("chat/completions", "messages")
        body = {**self._body, name: rendered}
        if self._flags.seed is not None:
            body["seed"] = derive_seed(self._flags.seed, prompt.query_id, sample)
        most = self._flags.max_retries
        for retries in range(most + 1):
            try:
                exchange = asyncio.wait_for(self._exchange(path, json.dumps(body).encode()), self._flags.timeout)
                status, wish, content = asyncio.run_coroutine_threadsafe(exchange, self._loop).result()
                with self._lock:  # one parsed body in memory at a time
                    error = read_error(status, content)
            except self._failures as failure:
                words = shorten(str(failure)) or f"{type(failure).__name__}, --timeout is {self._flags.timeout:g} s"
                wish, error = None, (None, "temporary", words)
            if error is None:
                with self._lock:
                    text, usage = read_completion(content, self._stop_strings)
                return text, usage + Counter(retries=retries)
            if error[1] != "temporary" or retries == most or self._ending.is_set():
                break
            delay = retry_delay(retries, wish)
            if time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + RETRY_LINE
                logger.warning("retrying in %.1f s (%d of %d): %s", delay, retries + 1, most, error[2])
            self._ending.wait(delay)
        raise self._input_error(*error)

    async def _exchange(self, path: str, content: bytes) -> tuple[int, str | None, bytes]:
        """Posts once; returns status, Retry-After, and the body up to where it is too large."""
        body = bytearray()
        async with self._client.stream("POST", f"{self.base_url}/{path}", content=content) as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) >= MAX_BODY:
                    break
        return response.status_code, response.headers.get("Retry-After"), bytes(body)

    def _input_error(self, status: int | None, about: str, words: str) -> InputError:
        found = "no response" if status is None else f"status {status}"
        if about == "prompt":
            return RefusedPromptError(f"{found} ({words})")
        expected = {
            None: "expected a running server there",
            401: "expected OPENAI_API_KEY to hold a key that it accepts, or --base_url a user and password",
            403: "expected OPENAI_API_KEY to hold a key that it accepts, or --base_url a user and password",
            404: "expected a base_url that usually ends in /v1, and the name of a model that it serves",
            "setting": "expected settings that it supports",
            "credit": "expected an account with credit",
        }
        words_of = expected.get(about) or expected.get(status, "expected a response after the retries")
        return InputError(f"{self.base_url}: found {found} ({words}), {words_of}; {KEPT}")


def retry_delay(retries: int, wish: str | None) -> float:
    """Returns the seconds until the next try: doubled each time up to 8, or what Retry-After says up to 60."""
    delay = min(RETRY_DELAY * 2 ** min(retries, 9), MAX_RETRY_DELAY) * random.uniform(0.75, 1)
    with contextlib.suppress(ValueError):  # a date
        delay = min(max(delay, float(wish or 0)), MAX_RETRY_AFTER)
    return delay
