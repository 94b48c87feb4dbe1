"""Responses from an OpenAI-compatible server (vLLM, SGLang, OpenAI), many requests at a time.

The `openai` client retries what can be retried: failed connections, time-outs, and the statuses 408, 409, 429 and 5xx.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from apo.cli import InputError, at_least, describe
from apo.generation import derive_seed
from apo.prompts import Prompt

logger = logging.getLogger(__name__)

REFUSED_PROMPT = (400, 413, 422)  # HTTP statuses that are about this one request
MAX_REASON = 300  # characters of a server's message
NO_KEY = "none"  # local servers need no key, but the client does
KEPT = "all responses so far are kept: the same command resumes"


class RefusedPromptError(InputError):
    """The server will never accept this prompt: it is too long, against the server's rules, or a setting is wrong."""


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a server."""
    group = parser.add_argument_group("server", "a key, if needed, is read from OPENAI_API_KEY and never shown")
    add = group.add_argument
    add("--base_url", help="for example http://localhost:8000/v1 (default: OPENAI_BASE_URL, else OpenAI)")
    add("--concurrency", type=at_least(1), default=16, help="requests at a time (default: 16)")
    add("--timeout", type=at_least(0.1), default=600, help="seconds that one request may take (default: 600)")
    add("--max_retries", type=at_least(0), default=8, help="of a request, with exponential back-off (default: 8)")
    add(
        "--skip_refused",
        action="store_true",
        help="leave out and name prompts that the server refuses, such as too long ones, instead of ending the run; "
        "the next run retries them",
    )


class ServerEngine:
    """An `apo.generation.Engine` with an OpenAI-compatible server.

    `usage` counts `responses`, those `truncated` at the largest number of new tokens, `retries`, and the server's own
    `prompt_tokens` and `completion_tokens`, of the prompts that were kept.
    """

    def __init__(
        self, rendered: dict[Prompt, Any], body: dict[str, Any], flags: argparse.Namespace, num_samples: int
    ) -> None:
        """Makes the client; connects to no server yet.

        Args:
            rendered: prompt -> its text, or the messages of a chat.
            body: the fields of all requests, but for prompt and seed.
            flags: those of `add_server_flags`, and the `seed` of the run; without one requests have no seed.
            num_samples: responses of a prompt, each one request.

        Raises:
            InputError: no server is named, or the address or the key cannot be one.
        """
        import openai

        if not (flags.base_url or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_KEY")):
            raise InputError("found neither --base_url nor OPENAI_API_KEY in the environment, expected one of them")
        for name in ("openai", "httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # otherwise one line per request
        self._key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
        if not (self._key.isascii() and self._key.isprintable()):  # the error of the HTTP library would show it
            raise InputError("OPENAI_API_KEY: found characters that no key has, expected printable ASCII")
        options = {"base_url": flags.base_url, "timeout": flags.timeout, "max_retries": flags.max_retries}
        try:
            self._client = openai.OpenAI(api_key=self._key, **options)
        except Exception as error:  # the HTTP library has several types for a bad address
            raise InputError(f"--base_url {flags.base_url}: expected http://... ({error})") from error
        self._api_error = openai.APIError
        self._rendered, self._body, self._flags, self._num_samples = rendered, body, flags, num_samples
        self.usage: Counter[str] = Counter()
        url = self._client.base_url
        self.base_url = f"{url.scheme}://{url.netloc.decode()}{url.path}".rstrip("/")  # without a password
        self.settings: dict[str, Any] = {}
        self.notes = {"base_url": self.base_url}
        self.share = list(rendered)

    def generate(self, prompts: list[Prompt], keep: Callable[[Prompt, list[str]], None]) -> None:
        """See `Engine`. After a failure or Ctrl-C no new prompt is sent; requests in progress are completed and kept.

        Raises:
            InputError: a request failed after its retries, or the server refused a prompt.
        """
        lock = threading.Lock()

        def respond(prompt: Prompt) -> None:
            try:
                responses = [self._request(prompt, sample) for sample in range(self._num_samples)]
            except RefusedPromptError as error:
                place = f"{prompt.place}, id {prompt.query_id}"
                if not self._flags.skip_refused:
                    raise InputError(
                        f"{place}: the server refused it with {error}; fix it, or leave out such prompts with "
                        f"--skip_refused; {KEPT}"
                    ) from None
                logger.warning("%s: refused with %s", place, error)
                return
            with lock:  # in the thread of the request: Ctrl-C cannot come between the response and the disk
                keep(prompt, [text for text, _ in responses])
                self.usage += sum((usage for _, usage in responses), Counter())

        pool = ThreadPoolExecutor(self._flags.concurrency)
        try:
            for future in as_completed([pool.submit(respond, prompt) for prompt in prompts]):
                future.result()
        except KeyboardInterrupt:
            logger.warning("interrupted: waiting for the requests in progress, whose responses are kept")
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _request(self, prompt: Prompt, sample: int) -> tuple[str, Counter[str]]:
        """Returns the text and the usage of one response."""
        body = dict(self._body)
        if self._flags.seed is not None:
            body["seed"] = derive_seed(self._flags.seed, prompt.query_id, sample)
        text = self._rendered[prompt]
        try:
            if isinstance(text, str):
                raw = self._client.completions.with_raw_response.create(prompt=text, **body)
            else:
                raw = self._client.chat.completions.with_raw_response.create(messages=text, **body)
        except self._api_error as error:
            raise self._input_error(error) from None  # the client's error holds the key
        try:
            text, usage = _parse_completion(raw.http_response.text)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.base_url}: found a response that cannot be read ({type(error).__name__}: {error}), "
                f"expected the JSON of the OpenAI protocol; {KEPT}"
            ) from error
        return text, usage + Counter(retries=raw.retries_taken)

    def _input_error(self, error: Exception) -> InputError:
        status = getattr(error, "status_code", None)
        reason = str((status is None and error.__cause__) or error)
        if self._key != NO_KEY:
            reason = reason.replace(self._key, "***")
        reason = " ".join(reason.split())[:MAX_REASON]
        if status in REFUSED_PROMPT:
            return RefusedPromptError(f"status {status} ({reason})")
        expected = {
            None: "expected a running server there",
            401: "expected OPENAI_API_KEY to hold a key that it accepts",
            403: "expected OPENAI_API_KEY to hold a key that it accepts",
            404: "expected a base_url that usually ends in /v1, and the name of a model that it serves",
        }.get(status, "expected a response after the retries")
        found = "no response" if status is None else f"status {status}"
        return InputError(f"{self.base_url}: found {found} ({reason}), {expected}; {KEPT}")


def _parse_completion(body: str) -> tuple[str, Counter[str]]:
    """Reads text and usage; raises ValueError, LookupError, TypeError or AttributeError for another body."""
    completion = json.loads(body)
    choice = completion["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if not isinstance(text, str | None):
        raise TypeError(f"the text is {describe(text)}")
    usage = Counter(responses=1, truncated=choice.get("finish_reason") == "length")
    for name in ("prompt_tokens", "completion_tokens"):
        usage[name] = (completion.get("usage") or {}).get(name) or 0
    return text or "", usage
