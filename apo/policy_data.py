"""Training data of the LLM: scored responses -> token ids, cached on disk -> batches."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apo.batches import count_tokens
from apo.cli import BadField, InputError, describe_counts, sha256_of_file
from apo.policy_model import token_tensors
from apo.prompts import Prompt, render_prompts
from apo.records import PreferenceRecord, iter_valid, log_remarks, parse_record, record_kind
from apo.row_cache import cache_path, cached_rows
from apo.sampling import tokenize

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DATASET_VERSION = 2  # part of the cache key: raise it when the rows of `tokenize_records` change
TOKENIZE_BATCH_SIZE = 512
UNCUT = 10**9
SCORE_IT = (
    "score the responses with train.py --task_type inference, then select: tools/rejection_sampling.py --to_pairs"
)


# ------------------------------------------------------------------------------------------------ records


def iter_scored_records(path: str | Path, align_type: str) -> Iterator[PreferenceRecord]:
    """Reads records of scored responses; for `sft` also golden ones, which have one response.

    Raises:
        InputError: see `apo.records.iter_valid`; also for a record without a prompt, and for responses without scores.
    """

    def parse(raw: dict[str, Any], default_id: str) -> PreferenceRecord:
        kind = record_kind(raw)
        if kind == "reject_sample":
            raise BadField("scores", "a query record, without scores", f"text and scores; {SCORE_IT}")
        if kind == "golden" and align_type != "sft":
            raise BadField("golden", "one response, without a score", "text and scores, or --align_type sft")
        record = parse_record(raw, default_id, kind=kind)
        if not record.prompts[0].strip():
            raise BadField("text" if "text" in raw else "prompt", "no prompt", "one, in a text before <sep>")
        return record

    for place, record in iter_valid(path, parse):
        record.place = place
        yield record


def choose_responses(record: PreferenceRecord, align_type: str) -> list[int]:
    """Returns the responses to train on, the best first: all for rrhf, best and worst for dpo, else the best.

    Among equal scores they are in file order, so that the best is the first and the worst the last.
    """
    order = sorted(range(len(record.scores)), key=lambda i: -record.scores[i])
    return {"rrhf": order, "dpo": [order[0], order[-1]]}.get(align_type, order[:1])


def end_token_id(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """Returns the token that ends a response: the first one after it in the model's chat template, else eos."""
    if template != "chat":
        return tokenizer.eos_token_id
    marker = "\u2767"
    messages = [{"role": "user", "content": marker}, {"role": "assistant", "content": marker}]
    try:
        ending = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(marker)[2]
    except Exception as error:  # a template can raise anything
        raise InputError(f"the model's chat template refuses a response ({' '.join(str(error).split())})") from error
    ids = tokenizer(ending.lstrip(), add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------------ tokens


def cut(
    prompt_ids: list[int], responses_ids: list[list[int]], bos_token_id: int | None, max_length: int
) -> tuple[list[int], list[list[int]]]:
    """Cuts a prompt at its start, so that the longest of its responses fits into `max_length` tokens.

    All responses keep the same prompt, with its bos and at least one more token. A response that leaves no room for
    that is cut at its end, and so loses its eos.
    """
    num_bos = int(prompt_ids[0] == bos_token_id)
    num_kept = min(len(prompt_ids), num_bos + 1)
    responses_ids = [ids[: max_length - num_kept] for ids in responses_ids]
    num_room = max_length - max(map(len, responses_ids))
    num_cut = max(0, len(prompt_ids) - num_room)
    return prompt_ids[:num_bos] + prompt_ids[num_bos + num_cut :], responses_ids


def tokenize_records(
    path: str | Path,
    records: Iterable[PreferenceRecord],
    tokenizer: PreTrainedTokenizerBase,
    *,
    align_type: str,
    template: str,
    max_length: int,
) -> Iterator[dict[str, Any]]:
    """Yields one row per record: the ids that were sampled, as far as they can be known.

    The prompt is encoded as `apo.sampling` does, each response apart from it, with the end token; that a sampled
    response was cut at `--max_new_tokens`, and so had none, is not in the data. After the prompt of a chat template
    a response has no leading space.

    Row: `prompt_ids`, `response_ids` (one list for each response to train on, the best first), their `scores`;
    `left_out`, the reason why there is nothing to learn from the record, or ""; `query_id` and `remarks` of
    the record; `num_cut_prompts`, `num_cut_responses`; and the counts of `apo.batches.count_tokens`.
    """
    records = iter(records)
    while batch := list(itertools.islice(records, TOKENIZE_BATCH_SIZE)):
        prompts = [Prompt(record.place, record.query_id, record.prompts[0]) for record in batch]
        prompts_ids = tokenize(tokenizer, render_prompts(str(path), prompts, template), template, UNCUT)
        end_id = end_token_id(tokenizer, template)  # after `tokenize`, which has a time limit for the template
        for record, whole_prompt in zip(batch, prompts_ids, strict=True):
            chosen = choose_responses(record, align_type)
            texts = [record.responses[i].removeprefix(" " * (template == "chat")) for i in chosen]
            encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
            whole_responses = [[*ids, end_id] for ids in encoded]
            prompt_ids, responses_ids = cut(whole_prompt, whole_responses, tokenizer.bos_token_id, max_length)
            scores = [record.scores[i] for i in chosen]
            yield {
                "prompt_ids": prompt_ids,
                "response_ids": responses_ids,
                "scores": scores,
                "left_out": _reason_to_leave_out(align_type, scores, responses_ids),
                "query_id": record.query_id,
                "remarks": record.remarks,
                "num_cut_prompts": int(len(prompt_ids) < len(whole_prompt)),
                "num_cut_responses": sum(map(int.__gt__, map(len, whole_responses), map(len, responses_ids))),
                **count_tokens([prompt_ids + ids for ids in responses_ids]),
            }


def _reason_to_leave_out(align_type: str, scores: list[float], responses_ids: list[list[int]]) -> str:
    if align_type == "dpo" and scores[0] == scores[1]:
        return "with equal scores"
    if align_type == "dpo" and responses_ids[0] == responses_ids[1]:
        return "with equal responses"
    return ""


def _row_features() -> datasets.Features:
    import datasets

    ids = datasets.List(datasets.Value("int32"))
    counts = ("num_cut_prompts", "num_cut_responses", "length", "num_tokens", "longest")
    return datasets.Features(
        {"prompt_ids": ids, "response_ids": datasets.List(ids), "scores": datasets.List(datasets.Value("float64"))}
        | dict.fromkeys(("left_out", "query_id"), datasets.Value("string"))
        | {"remarks": datasets.List(datasets.Value("string"))}
        | dict.fromkeys(counts, datasets.Value("int32"))
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that the ids depend on, for the cache of tokenised data."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def load_policy_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    align_type: str,
    template: str,
    max_length: int,
    cache_dir: str | None = None,
    num_records: int | None = None,
) -> datasets.Dataset:
    """Reads, validates and tokenises a file of scored responses once; see `apo.row_cache`.

    Args:
        path: text-scores or prompt / chosen / rejected records; for `sft` also golden ones.
        tokenizer: of the LLM.
        align_type: `rjs`, `dpo`, `rrhf` or `sft`.
        template: one of `apo.prompts.TEMPLATES`.
        max_length: tokens of a prompt and a response; see `cut`.
        cache_dir: of the tokenised data.
        num_records: the first so many records only.

    Returns:
        The rows of `tokenize_records` that there is something to learn from, in file order.

    Raises:
        InputError: bad records, or none that there is something to learn from.
    """
    settings = {"align_type": align_type, "template": template, "max_length": max_length}
    key = [DATASET_VERSION, sha256_of_file(path), fingerprint(tokenizer), settings]

    def make_rows() -> Iterator[dict[str, Any]]:
        return tokenize_records(path, iter_scored_records(path, align_type), tokenizer, **settings)

    dataset = cached_rows(cache_path(cache_dir, "policy_data", key), make_rows, _row_features(), path)
    dataset = dataset.select(range(len(dataset))[:num_records])
    reasons = dataset["left_out"][:]
    used = [i for i, reason in enumerate(reasons) if not reason]
    _log_counts(path, dataset, Counter(filter(None, reasons)), max_length)
    if not used:
        found = describe_counts(Counter(reasons), "records")
        raise InputError(f"{path}: found {found}, expected a better and a worse response in one of them at least")
    return dataset.select(used) if len(used) < len(dataset) else dataset


def _log_counts(path: str | Path, dataset: datasets.Dataset, left_out: Counter[str], max_length: int) -> None:
    logger.info("%s: %d records, %s left out", path, len(dataset), describe_counts(left_out, "of them"))
    log_remarks(path, dataset["remarks"])
    for name in ("prompts", "responses"):
        if num_cut := sum(dataset[f"num_cut_{name}"][:]):
            logger.warning("%s: %d %s cut, so that %d tokens suffice (--max_length)", path, num_cut, name, max_length)


# ------------------------------------------------------------------------------------------------ batches


@dataclass
class PolicyDataCollator:
    """Makes a batch of B items, their N responses one after another.

        [{"prompt_ids": [1, 2], "response_ids": [[3, 4], [5]], "scores": [0.7, -0.2]},
         {"prompt_ids": [6], "response_ids": [[7]], "scores": [1.0]}]

    becomes `lengths` [[2, 1], [1, 0]] (B, R), 0 where an item has no such response, `scores` [[0.7, -0.2], [1, 0]],
    `reference_logps` (B, R) of the column of that name, 0 without one, and the tensors of
    `apo.policy_model.token_tensors`, with `labels` [3, 4, 5, 7] (M,).
    """

    batching: str = "tree"

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        num_responses = max(len(item["response_ids"]) for item in items)

        def fill(rows: list[list[float]], dtype: torch.dtype) -> torch.Tensor:
            filled = [[*row, *[0] * (num_responses - len(row))] for row in rows]
            return torch.tensor(filled, dtype=dtype)  # (B, R)

        pairs = [(item["prompt_ids"], ids) for item in items for ids in item["response_ids"]]
        sequences, prompt_lengths = [prompt + ids for prompt, ids in pairs], [len(prompt) for prompt, _ in pairs]
        return {
            "lengths": fill([[len(ids) for ids in item["response_ids"]] for item in items], torch.long),
            "scores": fill([item["scores"] for item in items], torch.float64),
            "reference_logps": fill([item.get("reference_logps", []) for item in items], torch.float32),
            "query_ids": [item["query_id"] for item in items],
            **token_tensors(sequences, prompt_lengths, self.batching),
        }
