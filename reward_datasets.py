"""Preference data sets: records -> token ids, cached on disk -> batches.

Heavy packages are imported inside the functions that need them, so that the command line starts quickly.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apo.batches import count_tokens
from apo.cli import InputError, sha256_of_file
from apo.records import PreferenceRecord, iter_preference_data, warn_of_fields
from apo.row_cache import cache_path, cached_rows

if TYPE_CHECKING:
    import datasets

    from apo.tokenizer import RewardTokenizer

logger = logging.getLogger(__name__)

ABSENT_SCORE = -1.0  # marks an absent response in a ragged (B, R) score matrix
TOKENIZE_BATCH_SIZE = 512
DATASET_VERSION = 5  # part of the cache key: raise it when the rows of `tokenize_records` change


# ------------------------------------------------------------------------------------------------ tokenising


def normalize_scores(scores: list[float]) -> list[float]:
    """Min-max normalises the scores of one item into (0, 1): (s - min + 1e-5) / (max - min + 2e-5), in float32.

    Scores that differ stay different: where rounding makes them equal, the higher one becomes the next number.
    """
    ordered = sorted(set(scores))
    values = np.float32([(score - ordered[0] + 1e-5) / (ordered[-1] - ordered[0] + 2e-5) for score in ordered])
    for i in range(1, len(values)):
        values[i] = max(values[i], np.nextafter(values[i - 1], np.float32(2)))
    normalized = dict(zip(ordered, values.tolist(), strict=True))
    return [normalized[score] for score in scores]


def build_sequence(
    prompt_ids: list[int],
    response_ids: list[int],
    tokenizer: RewardTokenizer,
    *,
    max_length: int,
    truncation_side: str,
    add_sep_token: bool,
) -> list[int]:
    """Returns [bos] + prompt + [sep] + response + eos, cut to `max_length` tokens at the truncation side.

    Qwen's tokenizers have no bos.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    separator = [tokenizer.sep_token_id] if add_sep_token else []
    ids = [*bos, *prompt_ids, *separator, *response_ids, tokenizer.eos_token_id]
    return ids[-max_length:] if truncation_side == "left" else ids[:max_length]


def preferred_pairs(scores: list[float]) -> list[tuple[int, int]]:
    """Returns the pairs (i, j) of an item's responses in which i has the higher score."""
    return [(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] > scores[j]]


def encode_records(
    placed: Iterable[tuple[Any, PreferenceRecord]], tokenizer: RewardTokenizer
) -> Iterator[tuple[Any, PreferenceRecord, list[tuple[list[int], list[int]]]]]:
    """Adds to each (place, record) the (prompt ids, response ids) of its responses; no border merges."""
    placed = iter(placed)
    while batch := list(itertools.islice(placed, TOKENIZE_BATCH_SIZE)):
        prompts = list(dict.fromkeys(prompt for _, record in batch for prompt in record.prompts))
        prompt_ids = dict(zip(prompts, tokenizer.encode(prompts), strict=True))
        response_ids = iter(tokenizer.encode([response for _, record in batch for response in record.responses]))
        for place, record in batch:
            yield place, record, [(prompt_ids[prompt], next(response_ids)) for prompt in record.prompts]


def tokenize_records(
    records: Iterable[PreferenceRecord],
    tokenizer: RewardTokenizer,
    *,
    max_length: int,
    truncation_side: str,
    add_sep_token: bool,
) -> Iterator[dict[str, Any]]:
    """Yields one row per record; see `encode_records`.

    Row: `input_ids` R lists of ids, `scores` R normalised scores, five fields of the record, three counts: `num_pairs`
    (ordered pairs with different scores), `num_truncated` (responses cut to `max_length`), `num_identical` (pairs
    whose two sequences became the same, from which nothing can be learnt), and three sizes in tokens: `length` (of all
    sequences as a prefix tree), `num_tokens` (their sum), `longest`.
    """
    settings = {"max_length": max_length, "truncation_side": truncation_side, "add_sep_token": add_sep_token}
    for _, record, pairs_ids in encode_records(enumerate(records), tokenizer):
        sequences = [build_sequence(*ids, tokenizer, **settings) for ids in pairs_ids]
        num_special = 1 + (tokenizer.bos_token_id is not None) + add_sep_token
        scores = normalize_scores(record.scores)
        yield {
            "input_ids": sequences,
            "scores": scores,
            "is_apo": record.is_apo,
            "query_id": record.query_id,
            "response_keys": record.response_keys,
            "passed_over": record.passed_over,
            "doubts": record.doubts,
            "num_truncated": sum(len(p) + len(r) + num_special > max_length for p, r in pairs_ids),
            **_count_pairs(scores, sequences),
            **count_tokens(sequences),
        }


def _count_pairs(scores: list[float], sequences: list[list[int]]) -> dict[str, int]:
    pairs = preferred_pairs(scores)
    return {"num_pairs": len(pairs), "num_identical": sum(sequences[i] == sequences[j] for i, j in pairs)}


def _row_features() -> datasets.Features:
    import datasets

    value = datasets.Value
    return datasets.Features(
        {
            "input_ids": datasets.List(datasets.List(value("int32"))),
            "scores": datasets.List(value("float32")),
            "is_apo": value("bool"),
            "query_id": value("string"),
            **{name: datasets.List(value("string")) for name in ("response_keys", "passed_over", "doubts")},
            **dict.fromkeys(("num_truncated", "num_pairs", "num_identical"), value("int32")),
            **dict.fromkeys(("length", "num_tokens", "longest"), value("int32")),
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
    num_records: int | None = None,
    response_keys: Sequence[str] = (),
) -> datasets.Dataset:
    """Reads, validates and tokenises a file once, into a memory-mapped Arrow file that later runs and ranks share.

    The cache (`apo.row_cache`) is keyed by the bytes of the file, the tokenizer and the settings.

    Returns:
        A data set with the rows of `tokenize_records`, in file order; the first `num_records` if that is given.

    Raises:
        InputError: see `load_preference_data`.
    """
    settings = {"max_length": max_length, "truncation_side": truncation_side, "add_sep_token": add_sep_token}
    key = [DATASET_VERSION, sha256_of_file(path), tokenizer.fingerprint, data_type, settings, sorted(response_keys)]

    def make_rows() -> Iterator[dict[str, Any]]:
        return tokenize_records(
            iter_preference_data(path, data_type, add_sep_token, response_keys), tokenizer, **settings
        )

    dataset = cached_rows(cache_path(cache_dir, "preference_data", key), make_rows, _row_features(), path)
    if num_records is not None:
        dataset = dataset.select(range(min(len(dataset), num_records)))
    _log_counts(path, dataset)
    return dataset


def _log_counts(path: str | Path, dataset: datasets.Dataset) -> None:
    columns = dataset.select_columns(["num_pairs", "num_truncated", "num_identical"]).with_format("numpy")[:]
    counts = {name: int(column.sum()) for name, column in columns.items()}
    num_equal = int((columns["num_pairs"] == 0).sum())
    logger.info(
        "%s: %d items, %d pairs, %d responses truncated, %d items without a pair (all scores equal)",
        *(path, len(dataset), counts["num_pairs"], counts["num_truncated"], num_equal),
    )
    warn_of_fields(path, dataset["passed_over"], dataset["doubts"])
    if counts["num_identical"]:
        logger.warning("%s: the two sides of %d pairs are the same tokens", path, counts["num_identical"])


def merge_training_data(parts: dict[str, datasets.Dataset]) -> datasets.Dataset:
    """Concatenates the training files, {path: data set}, in order.

    Raises:
        InputError: a file has nothing to learn from: no record has two different scores, or all pairs are identical.
    """
    import datasets

    for path, part in parts.items():
        if not any(part["num_pairs"]):
            raise InputError(
                f'{path}: field "scores": found equal scores within each of the {len(part)} records, '
                "expected at least one preferred response"
            )
        if part["num_identical"][:] == part["num_pairs"][:]:
            raise InputError(
                f"{path}: the two sides of all {sum(part['num_pairs'])} pairs are the same tokens; give pairs that "
                "differ, or raise --max_length, beyond which text is cut off"
            )
    return datasets.concatenate_datasets(list(parts.values()))


def name_datasets(paths: list[str]) -> dict[str, str]:
    """Names each file by its base name; files of the same name get as many folders as make the names unique."""
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
    """Makes a batch of B items, their N present responses one after another.

    Padded: every response is one row, padded to the longest row of the batch. Two items, of 2 and 1 responses, with
    pad id 3 and right padding:

        [{"input_ids": [[1, 7, 2], [1, 2]], "scores": [0.9, 0.1], "is_apo": False},
         {"input_ids": [[1, 2]], "scores": [0.5], "is_apo": True}]

    become `input_ids` [[1, 7, 2], [1, 2, 3], [1, 2, 3]] (N, T), `attention_mask` [[1, 1, 1], [1, 1, 0], [1, 1, 0]],
    `scores` [[0.9, 0.1], [0.5, -1]] (B, R) with -1 where an item has no such response, `apo_mask` [0, 1] (B,).

    As a tree: `scores` and `apo_mask` are the same, `input_ids` is (1, S), `attention_mask` (N, T) that of the paths,
    and `tree` holds the other tensors of `apo.tree.build_token_tree`.
    """

    pad_token_id: int
    padding_side: str = "right"
    batching: str = "padded"

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        num_responses = max(len(item["scores"]) for item in items)
        scores = torch.full((len(items), num_responses), ABSENT_SCORE)
        for row, item in zip(scores, items, strict=True):
            row[: len(item["scores"])] = torch.as_tensor(item["scores"])
        apo_mask = torch.tensor([float(item["is_apo"]) for item in items])
        sequences = [ids for item in items for ids in item["input_ids"]]
        query_ids = {"query_ids": [item["query_id"] for item in items]} if "query_id" in items[0] else {}
        return {"scores": scores, "apo_mask": apo_mask, **query_ids, **self.token_tensors(sequences)}

    def token_tensors(self, sequences: list[list[int]]) -> dict[str, Any]:
        """Returns the tensors of a batch that depend on N sequences of token ids alone."""
        import torch

        if self.batching == "tree":
            from apo.tree import build_token_tree

            tree = build_token_tree(sequences)
            return {"input_ids": tree.pop("input_ids"), "attention_mask": tree.pop("attention_mask"), "tree": tree}
        rows = [torch.as_tensor(ids, dtype=torch.long) for ids in sequences]
        pad = functools.partial(
            torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=self.padding_side
        )  # (N, T)
        return {
            "input_ids": pad(rows, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in rows], padding_value=0),
        }
