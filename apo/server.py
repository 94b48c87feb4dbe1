"""Responses from an OpenAI-compatible server (vLLM, SGLang, OpenAI), many requests at a time.

What can be retried is retried: failed connections, time-outs, and the statuses 408, 409, 429 and 5xx. The client is
httpx2 and not openai, which has no limit for the time of a whole request or for the size of an error.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import httpx2

from apo.cli import InputError, at_least, hidden
from apo.completion import (
    MAX_BODY,
    TRUNCATED,
    NoResponseError,
    TemporaryError,
    check_status,
    read_completion,
    shorten,
)
from apo.generation import BrokenOff, derive_seed
from apo.prompts import Prompt

logger = logging.getLogger(__name__)

RETRY_DELAY = 0.5  # seconds before the first retry
RETRIED = "were asked for again"
KEPT = "all responses so far are kept: the same command resumes"


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a server."""
    group = parser.add_argument_group("server", "a key, if needed, is read from OPENAI_API_KEY and never shown")
    add = group.add_argument
    add("--base_url", help="for example http://localhost:8000/v1 (default: OPENAI_BASE_URL, else OpenAI)")
    add("--concurrency", type=at_least(1), default=16, help="requests at a time (default: 16)")
    add("--timeout", type=at_least(0.1), default=600, help="seconds that one try may take in all (default: 600)")
    help_text = "of a request, after up to 8 seconds, or up to 60 if Retry-After asks for them (default: 8)"
    add("--max_retries", type=at_least(0), default=8, help=help_text)
    help_text = "leave out prompts that the server refuses; end with status 0 although prompts have no response"
    add("--skip_refused", action="store_true", help=help_text)


class ServerEngine:
    """An `apo.generation.Engine` with an OpenAI-compatible server; `remarks` counts what is odd in its responses."""

    def __init__(
        self,
        rendered: dict[Prompt, Any],
        body: dict[str, Any],
        flags: argparse.Namespace,
        num_samples: int,
        stop_strings: tuple[str, ...] = (),
    ) -> None:
        """Makes the client; connects to no server yet.

        `rendered` has the text of each prompt, or the messages of a chat, and `body` all other fields of the requests
        but the seed. `flags` are those of `add_server_flags`, and the `seed` of the run; None sends none. A prompt has
        `num_samples` requests.

        Raises:
            InputError: no server is named, or the address or the key cannot be one.
        """
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        address = flags.base_url or os.environ.get("OPENAI_BASE_URL") or ("https://api.openai.com/v1" if key else "")
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
        self._rendered, self._body, self._flags, self._num_samples = rendered, body, flags, num_samples
        self._ending = asyncio.Event()
        self.remarks: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.base_url = f"{url.scheme}://{url.netloc.decode()}{url.path}".rstrip("/")  # without a password
        self.settings: dict[str, Any] = {}
        self.notes = {"base_url": self.base_url}
        self.stop_strings = stop_strings
        self.share = list(rendered)

    def generate(self, prompts: list[Prompt], keep: Callable[[Prompt, list[str]], None]) -> None:
        """See `Engine`. After a failure or Ctrl-C no new prompt is sent; requests in progress are completed and kept.

        Raises:
            InputError: a request failed after its retries, or the server refused a prompt.
        """
        loop = asyncio.new_event_loop()
        # In a thread of its own: Ctrl-C, which interrupts the main one, cannot come between response and disk.
        threading.Thread(target=loop.run_forever, daemon=True).start()
        run = asyncio.run_coroutine_threadsafe(self._respond_to_all(prompts, keep), loop)
        try:
            run.result()
        except KeyboardInterrupt as interrupt:
            logger.warning("interrupted: waiting for the requests in progress, whose responses are kept")
            loop.call_soon_threadsafe(self._ending.set)
            wait([run])  # a second Ctrl-C ends this
            raise type(interrupt)(KEPT) from None
        for remark, count in self.remarks.items():
            logger.warning("%d responses %s", count, remark)

    async def _respond_to_all(self, prompts: list[Prompt], keep: Callable[[Prompt, list[str]], None]) -> None:
        waiting = iter(prompts)

        async def work() -> None:
            for prompt in waiting:
                if self._ending.is_set():
                    return
                await self._respond(prompt, keep)

        workers = [asyncio.ensure_future(work()) for _ in range(self._flags.concurrency)]
        await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        self._ending.set()  # after a failure: the others end, too
        outcomes = await asyncio.gather(*workers, return_exceptions=True)
        for error in filter(None, outcomes):
            raise error

    async def _respond(self, prompt: Prompt, keep: Callable[[Prompt, list[str]], None]) -> None:
        """Keeps the responses to a prompt; counts one without, and names the first of each reason."""
        try:
            responses = [await self._request(prompt, sample) for sample in range(self._num_samples)]
        except InputError as error:
            raise InputError(f"{self.base_url}: {error}; {KEPT}") from None
        except NoResponseError as error:
            place = f"{prompt.place}, id {prompt.query_id}"
            if error.reason == "refused" and not self._flags.skip_refused:
                raise InputError(f"{place}: {error}; fix it, or leave such out: --skip_refused; {KEPT}") from None
            self.missing[error.reason] += 1
            if self.missing[error.reason] == 1:
                logger.warning("%s: no response: %s; further ones are counted", place, error)
            return
        keep(prompt, [BrokenOff(text) if TRUNCATED in remarks else text for text, remarks in responses])
        self.remarks.update(remark for _, remarks in responses for remark in remarks)

    async def _request(self, prompt: Prompt, sample: int) -> tuple[str, list[str]]:
        """Returns the text of one response, and what is odd about it."""
        rendered = self._rendered[prompt]
        path, name = ("completions", "prompt") if isinstance(rendered, str) else ("chat/completions", "messages")
        body = {**self._body, name: rendered}
        if self._flags.seed is not None:
            body["seed"] = derive_seed(self._flags.seed, prompt.query_id, sample)
        most, timeout = self._flags.max_retries, self._flags.timeout
        for retries in itertools.count():
            wish = None
            try:
                exchange = self._exchange(path, json.dumps(body).encode())
                status, wish, content = await asyncio.wait_for(exchange, timeout)
                check_status(status, content)
                return read_completion(content, self.stop_strings)
            except TemporaryError as error:
                found = str(error)
            except (httpx2.RequestError, asyncio.TimeoutError, OSError) as error:
                found = f"no response ({shorten(str(error)) or f'{type(error).__name__}, --timeout is {timeout:g} s'})"
            if retries == most or self._ending.is_set():
                raise InputError(f"found {found} after {retries} retries, expected a server that runs and responds")
            if not self.remarks[RETRIED]:
                logger.warning("found %s, trying again; further retries are counted", found)
            self.remarks[RETRIED] += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ending.wait(), retry_delay(retries, wish))

    async def _exchange(self, path: str, content: bytes) -> tuple[int, str | None, bytes]:
        """Posts once; returns status, Retry-After, and the body up to where it is too large."""
        body = bytearray()
        async with self._client.stream("POST", f"{self.base_url}/{path}", content=content) as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) >= MAX_BODY:
                    break
        return response.status_code, response.headers.get("Retry-After"), bytes(body)


def retry_delay(retries: int, wish: str | None) -> float:
    """Returns the seconds until the next try: doubled each time up to 8, or what Retry-After says up to 60."""
    delay = min(RETRY_DELAY * 2 ** min(retries, 9), 8.0) * random.uniform(0.75, 1)
    with contextlib.suppress(ValueError):  # a date
        delay = min(max(delay, float(wish or 0)), 60.0)
    return delay
