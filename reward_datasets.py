"""Preference data sets: records -> token ids, cached on disk -> batches.

Heavy packages are imported inside the functions that need them, so that the command line answers at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preference_records import InputError, PreferenceRecord, load_preference_data, read_records, sha256_of_file

if TYPE_CHECKING:
    import datasets
    import torch

    from models import RewardTokenizer

logger = logging.getLogger(__name__)

ABSENT_SCORE = -1.0  # marks the empty places of a ragged (B, R) score matrix
TOKENIZE_BATCH_SIZE = 512
DATASET_VERSION = 2  # part of the cache key: raise it when the rows of `tokenize_records` change


# ------------------------------------------------------------------------------------------------ tokenising


def normalize_scores(scores: list[float]) -> list[float]:
    """Min-max normalises the scores of one item into (0, 1): (s - min + 1e-5) / (max - min + 2e-5)."""
    low, high = min(scores), max(scores)
    return [(score - low + 1e-5) / (high - low + 2e-5) for score in scores]


def build_sequence(
    prompt_ids: list[int],
    response_ids: list[int],
    tokenizer: RewardTokenizer,
    *,
    max_length: int,
    truncation_side: str,
    add_sep_token: bool,
) -> list[int]:
    """Returns bos + prompt + [sep] + response + eos, cut to `max_length` tokens at the truncation side."""
    separator = [tokenizer.sep_token_id] if add_sep_token else []
    ids = [tokenizer.bos_token_id, *prompt_ids, *separator, *response_ids, tokenizer.eos_token_id]
    return ids[-max_length:] if truncation_side == "left" else ids[:max_length]


def tokenize_records(
    records: list[PreferenceRecord],
    tokenizer: RewardTokenizer,
    *,
    max_length: int,
    truncation_side: str,
    add_sep_token: bool,
) -> Iterator[dict[str, Any]]:
    """Yields one row per record; prompt and response are encoded apart, so their border never merges.

    Row: `input_ids` R lists of ids, `scores` R normalised scores, `is_apo`, `query_id`, `answer_keys`, three counts:
    `num_pairs` (ordered pairs with different scores), `num_truncated` (responses cut to `max_length`), `num_identical`
    (pairs whose two sequences became the same, so that nothing can be learnt from them).
    """
    for start in range(0, len(records), TOKENIZE_BATCH_SIZE):
        batch = records[start : start + TOKENIZE_BATCH_SIZE]
        prompts = {prompt: None for record in batch for prompt in record.prompts}
        prompt_ids = dict(zip(prompts, tokenizer.encode(list(prompts)), strict=True))
        response_ids = iter(tokenizer.encode([response for record in batch for response in record.responses]))
        for record in batch:
            pairs_ids = [(prompt_ids[prompt], next(response_ids)) for prompt in record.prompts]
            sequences = [
                build_sequence(
                    *ids,
                    tokenizer,
                    max_length=max_length,
                    truncation_side=truncation_side,
                    add_sep_token=add_sep_token,
                )
                for ids in pairs_ids
            ]
            num_special = 2 + add_sep_token
            scores = np.float32(normalize_scores(record.scores)).tolist()
            yield {
                "input_ids": sequences,
                "scores": scores,
                "is_apo": record.is_apo,
                "query_id": record.query_id,
                "answer_keys": record.answer_keys,
                "num_truncated": sum(len(p) + len(r) + num_special > max_length for p, r in pairs_ids),
                **_count_pairs(scores, sequences),
            }


def _count_pairs(scores: list[float], sequences: list[list[int]]) -> dict[str, int]:
    pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]
    return {"num_pairs": len(pairs), "num_identical": sum(sequences[i] == sequences[j] for i, j in pairs)}


def _generate_rows(
    path: str, tokenizer: RewardTokenizer, data_type: str, settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    records = load_preference_data(path, data_type, settings["add_sep_token"])
    yield from tokenize_records(records, tokenizer, **settings)


def _row_features() -> datasets.Features:
    import datasets

    value = datasets.Value
    return datasets.Features(
        {
            "input_ids": datasets.List(datasets.List(value("int32"))),
            "scores": datasets.List(value("float32")),
            "is_apo": value("bool"),
            "query_id": value("string"),
            "answer_keys": datasets.List(value("string")),
            **dict.fromkeys(("num_truncated", "num_pairs", "num_identical"), value("int32")),
        }
    )


def load_preference_dataset(
    path: str | Path,
    tokenizer: RewardTokenizer,
    *,
    data_type: str,
    max_length: int,
    truncation_side: str,
    add_sep_token: bool,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Reads, validates and tokenises a file once, into a memory-mapped Arrow file that later runs and ranks share.

    The cache is keyed by the bytes of the file, the tokenizer and the settings; a file lock lets one process of the
    machine do the work while the others wait.

    Returns:
        A dataset with the rows of `tokenize_records`, in file order.

    Raises:
        InputError: see `load_preference_data`.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if not Path(path).is_file():
        read_records(path)
    settings = {"max_length": max_length, "truncation_side": truncation_side, "add_sep_token": add_sep_token}
    key = [DATASET_VERSION, sha256_of_file(path), tokenizer.fingerprint, data_type, settings]
    datasets.disable_progress_bars()
    try:
        dataset = datasets.Dataset.from_generator(
            _generate_rows,
            features=_row_features(),
            cache_dir=cache_dir,
            gen_kwargs={"path": str(path), "tokenizer": tokenizer, "data_type": data_type, "settings": settings},
            fingerprint=hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32],
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise
    _log_counts(path, dataset)
    return dataset


def _log_counts(path: str | Path, dataset: datasets.Dataset) -> None:
    counts = {name: int(sum(dataset[name])) for name in ("num_pairs", "num_truncated", "num_identical")}
    logger.info(
        "%s: %d items, %d pairs, %d responses truncated, %d items without a pair (all scores equal)",
        *(path, len(dataset), counts["num_pairs"], counts["num_truncated"], list(dataset["num_pairs"]).count(0)),
    )
    if counts["num_identical"]:
        logger.warning("%s: the two sides of %d pairs are the same tokens", path, counts["num_identical"])


def name_datasets(paths: list[str]) -> dict[str, str]:
    """Names each file by its base name; files of the same name get as much of their folders as tells them apart."""
    names: dict[str, str] = {}
    for path in dict.fromkeys(os.path.normpath(path) for path in paths):
        parts = Path(path).parts
        others = [Path(os.path.normpath(other)).parts for other in paths if os.path.normpath(other) != path]
        length = next(
            n for n in range(1, len(parts) + 1) if n == len(parts) or not any(o[-n:] == parts[-n:] for o in others)
        )
        names["/".join(parts[-length:])] = path
    return names


# ------------------------------------------------------------------------------------------------ collating


@dataclass
class RewardDataCollator:
    """Makes a batch of B items: every response is one row, padded to the longest row of the batch.

    Two items, of 2 and 1 responses, with pad id 3 and right padding:

        [{"input_ids": [[1, 7, 2], [1, 2]], "scores": [0.9, 0.1], "is_apo": False},
         {"input_ids": [[1, 2]], "scores": [0.5], "is_apo": True}]

    become `input_ids` [[1, 7, 2], [1, 2, 3], [1, 2, 3]] (N, T), `attention_mask` [[1, 1, 1], [1, 1, 0], [1, 1, 0]],
    `scores` [[0.9, 0.1], [0.5, -1]] (B, R) with -1 where an item has no such response, `apo_mask` [0, 1] (B,).
    The N rows are the present responses, item by item.
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        num_responses = max(len(item["scores"]) for item in items)
        scores = torch.full((len(items), num_responses), ABSENT_SCORE)
        for row, item in zip(scores, items, strict=True):
            row[: len(item["scores"])] = torch.as_tensor(item["scores"])
        sequences = [torch.as_tensor(ids, dtype=torch.long) for item in items for ids in item["input_ids"]]
        pad = functools.partial(
            torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=self.padding_side
        )  # (N, T)
        return {
            "scores": scores,
            "apo_mask": torch.tensor([float(item["is_apo"]) for item in items]),
            "input_ids": pad(sequences, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in sequences], padding_value=0),
        }
