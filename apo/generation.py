"""Responses to the prompts of a file: decoding, the interface of the engines, and the run that keeps responses.

The engines are `apo.sampling.LocalEngine` and `apo.server.ServerEngine`. Only the first needs PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from apo.cli import InputError, describe_counts, first_few, locked
from apo.launch import process_rank
from apo.prompts import Prompt, count_cuts, format_response
from apo.resume import Keep, ResultStore, complete_items, read_recorded

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How responses are drawn; the names are those of transformers, and of the flags.

    `temperature` 0 is greedy, `top_k` 0 all tokens, `top_p` 1 and `repetition_penalty` 1 are off. The defaults are the
    reference's for sampling, which names no top_k; the transformers of its time then took 50.
    """

    num_samples: int = 4
    temperature: float = 1.2
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256


TESTING = Decoding(num_samples=1, temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05, max_new_tokens=512)
DECODING = {"sampling": Decoding(), "testing": TESTING}  # the reference's
LLAMA_2_CHAT_SAMPLING = Decoding(temperature=0.6, top_p=0.9)


def derive_seed(seed: int, query_id: str, sample: int) -> int:
    """Returns the seed of one response, in [0, 2**31).

    It depends only on the seed of the run, the id of the prompt and the number of the response, and so not on order,
    batches or processes.
    """
    key = json.dumps([seed, query_id, sample]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


class BrokenOff(str):
    """The text of a response that does not end by itself, but at the largest number of tokens."""

    __slots__ = ()


class Engine(Protocol):
    """Generates responses.

    `settings` are what the responses depend on, `notes` are only recorded, `stop_strings` are where a text is cut,
    `share` are the prompts of this process, `missing` counts those of them without a response, by the reason.
    """

    settings: dict[str, Any]
    notes: dict[str, Any]
    stop_strings: tuple[str, ...]
    share: list[Prompt]
    missing: Counter[str]

    def generate(self, prompts: list[Prompt], keep: Callable[[Prompt, list[str]], None]) -> None:
        """Calls `keep` with each prompt, of some or none of `share`, and its texts as soon as these are finished.

        It may do so in any order and from any thread, but for one prompt at a time. A text that breaks off is a
        `BrokenOff`.
        """


def read_written(store: ResultStore, fields: list[str]) -> dict[str, list[Any]]:
    """Returns what the result has of each prompt, by its key: responses, and the fields of those that break off."""
    recorded = read_recorded(store.result_path)
    names = frozenset(recorded.get("broken_off", ()))
    values: dict[str, list[Any]] = {}
    for record in store.load_result() or []:
        broken_off = [field for field in fields if f"{record['query_id']}:{field}" in names]
        key = Prompt("", record["query_id"], record["query"]).key
        values[key] = [record[field] for field in fields] + [broken_off] * ("broken_off" in recorded)
    return values


def list_broken_off(query_ids: list[str], values: list[list[Any]]) -> dict[str, list[str]]:
    """Returns the responses that break off; an empty object if some are of an earlier version, which did not say."""
    broken_off = [own[-1] for own in values]
    if not all(isinstance(fields, list) for fields in broken_off):
        return {}
    of_prompts = zip(query_ids, broken_off, strict=True)
    return {"broken_off": [f"{query_id}:{field}" for query_id, fields in of_prompts for field in fields]}


def generate_responses(
    store: ResultStore, prompts: list[Prompt], engine: Engine, fields: list[str], *, may_miss: bool
) -> list[dict[str, str]] | None:
    """Generates the responses that earlier runs have not, and writes the records of all; see `complete_items`.

    The settings file beside them lists the responses that break off, as "<query_id>:<field>".

    Args:
        prompts: all prompts of the file.
        fields: the names of the responses in a record.
        may_miss: whether prompts without responses are no error.

    Returns:
        `{"query_id", "query", <field>: <response>, ...}` of the prompts that have responses, in order; None if this
        run did not write them.

    Raises:
        InputError: no prompt has responses, or, after the result is written, one has none.
    """

    def work(todo: dict[str, Prompt], keep: Keep) -> None:
        num_cut = 0

        def trim_and_keep(prompt: Prompt, texts: list[str]) -> None:
            nonlocal num_cut
            num_cut += count_cuts(texts, engine.stop_strings)
            broken_off = [field for field, text in zip(fields, texts, strict=True) if isinstance(text, BrokenOff)]
            keep(prompt.key, [*(format_response(text, engine.stop_strings) for text in texts), broken_off])

        engine.generate(list(todo.values()), trim_and_keep)
        if num_cut:
            logger.info("%d responses cut where they continue as the user", num_cut)

    def make_records(values: dict[str, list[Any]]) -> list[dict[str, str]]:
        left_out = [prompt.query_id for prompt in prompts if prompt.key not in values]
        words = f"{describe_counts(engine.missing, 'prompts without a response')}, the same command asks again"
        if len(left_out) == len(prompts):
            raise InputError(f"{words}; expected a response to at least one")
        if left_out:
            logger.warning("%s; left out: %s", words, first_few(left_out))
        found = [prompt for prompt in prompts if prompt.key in values]
        store.findings = list_broken_off([prompt.query_id for prompt in found], [values[p.key] for p in found])
        return [
            {"query_id": prompt.query_id, "query": prompt.query, **dict(zip(fields, texts, strict=True))}
            for prompt in found
            for texts in [values[prompt.key][: len(fields)]]
        ]

    with locked(store.lock_path, wait=False):
        kept = store.load()  # before the result: the process that writes the result then deletes these
        written = read_written(store, fields)
        records = complete_items(
            store,
            {prompt.key: prompt for prompt in prompts},
            written | kept,
            work,
            make_records,
            noun="prompts",
            share=[prompt.key for prompt in engine.share],
            progress=process_rank() == 0,
        )
    if records is not None and len(records) < len(prompts) and not may_miss:
        found = f"{len(prompts) - len(records)} of {len(prompts)} prompts have no response"
        raise InputError(f"{found}; start again, or allow it: --skip_refused")
    return records
