"""Responses to the prompts of a file: decoding, the interface of the engines, and the run that keeps responses.

The engines are `apo.sampling.LocalEngine` and `apo.server.ServerEngine`. Only the first needs PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from apo.cli import InputError, first_few
from apo.prompts import Prompt, count_cuts, format_response
from apo.resume import Keep, ResultStore, complete_items

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ decoding


@dataclass(frozen=True, slots=True)
class Decoding:
    """How responses are drawn; the names are those of transformers, and of the flags.

    `temperature` 0 is greedy, `top_k` 0 all tokens, `top_p` 1 and `repetition_penalty` 1 are off.
    """

    num_samples: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    max_new_tokens: int

    def check(self) -> None:
        """Refuses values that cannot work.

        Raises:
            InputError: with flag, value and what is expected.
        """
        for name, is_right, expected in (
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0 (1 is none)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not is_right:
                raise InputError(f"--{name} {getattr(self, name)}: expected {expected}")
        if self.temperature == 0 and self.num_samples > 1:
            raise InputError(
                f"--temperature 0 --num_samples {self.num_samples}: expected 1, all would be the same response"
            )


# The reference's settings. Its sampling names no top_k; the transformers of its time then took 50.
DECODING = {
    "sampling": Decoding(
        num_samples=4, temperature=1.2, top_k=50, top_p=1.0, repetition_penalty=1.0, max_new_tokens=256
    ),
    "testing": Decoding(
        num_samples=1, temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05, max_new_tokens=512
    ),
}


def default_decoding(task_type: str, template: str) -> Decoding:
    """Returns the reference's settings for a task, `sampling` or `testing`, and a prompt template."""
    decoding = DECODING[task_type]
    if task_type == "sampling" and template == "llama-2-chat":
        return replace(decoding, temperature=0.6, top_p=0.9)
    return decoding


def derive_seed(seed: int, query_id: str, sample: int) -> int:
    """Returns the seed of one response, in [0, 2**31).

    It depends only on the seed of the run, the id of the prompt and the number of the response, and so not on order,
    batches or processes.
    """
    key = json.dumps([seed, query_id, sample]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


# ------------------------------------------------------------------------------------------------ engines


class Engine(Protocol):
    """Generates responses.

    `settings` are what the responses depend on, `notes` are only recorded, `share` are the prompts of this process.
    """

    settings: dict[str, Any]
    notes: dict[str, Any]
    share: list[Prompt]

    def generate(self, prompts: list[Prompt], keep: Callable[[Prompt, list[str]], None]) -> None:
        """Calls `keep` with each prompt, of some or none of `share`, and its texts as soon as these are finished.

        It may do so in any order and from any thread, but for one prompt at a time.
        """


def generate_responses(
    store: ResultStore,
    prompts: list[Prompt],
    engine: Engine | None,
    *,
    fields: list[str],
    stop_strings: tuple[str, ...],
    confirm: Callable[[dict[str, Prompt]], bool] = lambda todo: True,
    progress: bool = True,
) -> list[dict[str, str]] | None:
    """Generates the responses that earlier runs have not, and writes the records of all; see `complete_items`.

    Args:
        prompts: all prompts of the file.
        engine: None only if `confirm` returns False.
        fields: the names of the responses in a record.
        stop_strings: where a text is cut.
        confirm: is called with the unfinished prompts before the work, and ends the run by returning False.

    Returns:
        the records, see `make_records`; None if this run did not write them.
    """
    num_cut = 0

    def work(todo: dict[str, Prompt], keep: Keep) -> None:
        def trim_and_keep(prompt: Prompt, texts: list[str]) -> None:
            nonlocal num_cut
            num_cut += count_cuts(texts, stop_strings)
            keep(prompt.key, [format_response(text, stop_strings) for text in texts])

        engine.generate(list(todo.values()), trim_and_keep)
        if num_cut:
            logger.info("%d responses cut where they continue as the user", num_cut)

    return complete_items(
        store,
        {prompt.key: prompt for prompt in prompts},
        work,
        lambda responses: make_records(prompts, responses, fields),
        noun="prompts",
        read_record=lambda r: (Prompt("", r["query_id"], r["query"]).key, [r[field] for field in fields]),
        share=engine and [prompt.key for prompt in engine.share],
        confirm=confirm,
        progress=progress,
    )


def make_records(prompts: list[Prompt], responses: dict[str, list[str]], fields: list[str]) -> list[dict[str, str]]:
    """Returns `{"query_id", "query", <field>: <response>, ...}` of the prompts that have responses, in order.

    The others, which the server refused, are logged.

    Raises:
        InputError: no prompt has responses.
    """
    refused = [prompt.query_id for prompt in prompts if prompt.key not in responses]
    if len(refused) == len(prompts):
        raise InputError(f"the server refused all {len(prompts)} prompts; expected a response to at least one")
    if refused:
        logger.warning(
            "%d prompts refused by the server, left out: %s; the same command retries them",
            len(refused),
            first_few(refused),
        )
    return [
        {"query_id": prompt.query_id, "query": prompt.query} | dict(zip(fields, responses[prompt.key], strict=True))
        for prompt in prompts
        if prompt.key in responses
    ]
