"""Preference data sets: records -> token ids, cached on disk -> batches.

Heavy packages are imported inside the functions that need them, so that the command line starts quickly.
"""

from __future__ import annotations

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
from apo.records import PreferenceRecord, iter_preference_data, log_remarks
from apo.row_cache import cache_path, cached_rows

if TYPE_CHECKING:
    import datasets

    from apo.tokenizer import RewardTokenizer

logger = logging.getLogger(__name__)

ABSENT_SCORE = -1.0  # marks an absent response in a ragged (B, R) score matrix
TOKENIZE_BATCH_SIZE = 512
DATASET_VERSION = 6  # part of the cache key: raise it when the rows of `tokenize_records` change

Encoded = tuple[PreferenceRecord, list[tuple[list[int], list[int]]]]  # with prompt ids and ids of each response


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


def encode_records(records: Iterable[PreferenceRecord], tokenizer: RewardTokenizer) -> Iterator[Encoded]:
    """Yields each record with the token ids of its responses; prompt and response are encoded apart."""
    records = iter(records)
    while batch := list(itertools.islice(records, TOKENIZE_BATCH_SIZE)):
        prompts = list(dict.fromkeys(prompt for record in batch for prompt in record.prompts))
        prompt_ids = dict(zip(prompts, tokenizer.encode(prompts), strict=True))
        response_ids = iter(tokenizer.encode([response for record in batch for response in record.responses]))
        for record in batch:
            yield record, [(prompt_ids[prompt], next(response_ids)) for prompt in record.prompts]


def tokenize_records(
    records: Iterable[PreferenceRecord],
    tokenizer: RewardTokenizer,
    *,
    max_length: int,
    truncation_side: str,
    add_sep_token: bool,
) -> Iterator[dict[str, Any]]:
    """Yields one row per record; see `encode_records`.

    Row: `input_ids` R lists of ids, `scores` R normalised scores, four fields of the record, three counts: `num_pairs`
    (ordered pairs with different scores), `num_truncated` (responses cut to `max_length`), `num_identical` (pairs
    whose two sequences became the same, from which nothing can be learnt), and those of `apo.batches.count_tokens`.
    """
    settings = {"max_length": max_length, "truncation_side": truncation_side, "add_sep_token": add_sep_token}
    for record, pairs_ids in encode_records(records, tokenizer):
        sequences = [build_sequence(*ids, tokenizer, **settings) for ids in pairs_ids]
        num_special = 1 + (tokenizer.bos_token_id is not None) + add_sep_token
        scores = normalize_scores(record.scores)
        pairs = preferred_pairs(scores)
        yield {
            "input_ids": sequences,
            "scores": scores,
            "is_apo": record.is_apo,
            "query_id": record.query_id,
            "response_keys": record.response_keys,
            "remarks": record.remarks,
            "num_truncated": sum(len(p) + len(r) + num_special > max_length for p, r in pairs_ids),
            "num_pairs": len(pairs),
            "num_identical": sum(sequences[i] == sequences[j] for i, j in pairs),
            **count_tokens(sequences),
        }


def _row_features() -> datasets.Features:
    from datasets import Features, List, Value

    counts = ("num_truncated", "num_pairs", "num_identical", "length", "num_tokens", "longest")
    features = {
        "input_ids": List(List(Value("int32"))),
        "scores": List(Value("float32")),
        "is_apo": Value("bool"),
        "query_id": Value("string"),
        "response_keys": List(Value("string")),
        "remarks": List(Value("string")),
        **dict.fromkeys(counts, Value("int32")),
    }
    return Features(features)


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
        records = iter_preference_data(path, data_type, add_sep_token, response_keys)
        return tokenize_records(records, tokenizer, **settings)

    dataset = cached_rows(cache_path(cache_dir, "preference_data", key), make_rows, _row_features(), path)
    dataset = dataset.select(range(len(dataset))[:num_records])
    _log_counts(path, dataset)
    return dataset


def _log_counts(path: str | Path, dataset: datasets.Dataset) -> None:
    num_pairs, num_truncated, num_identical = (
        dataset[f"num_{name}"][:] for name in ("pairs", "truncated", "identical")
    )
    logger.info(
        "%s: %d items, %d pairs, %d responses truncated, %d items without a pair (all scores equal)",
        *(path, len(dataset), sum(num_pairs), sum(num_truncated), num_pairs.count(0)),
    )
    log_remarks(path, dataset["remarks"])
    if any(num_identical):
        logger.warning("%s: the two sides of %d pairs are the same tokens", path, sum(num_identical))


def merge_training_data(parts: dict[str, datasets.Dataset]) -> datasets.Dataset:
    """Concatenates the training files, {path: data set}, in order.

    Raises:
        InputError: a file has nothing to learn from: no record has two different scores, or all pairs are identical.
    """
    import datasets

    for path, part in parts.items():
        num_pairs = sum(part["num_pairs"][:])
        if not num_pairs:
            found = f"equal scores within each of the {len(part)} records, expected at least one preferred response"
            raise InputError(f'{path}: field "scores": found {found}')
        if num_pairs == sum(part["num_identical"][:]):
            advice = "give pairs that differ, or raise --max_length, beyond which text is cut off"
            raise InputError(f"{path}: the two sides of all {num_pairs} pairs are the same tokens; {advice}")
    return datasets.concatenate_datasets(list(parts.values()))


def name_datasets(paths: list[str]) -> dict[str, str]:
    """Names each file by its base name; files of the same name get as many folders as make the names unique."""
    names: dict[str, str] = {}
    paths = list(dict.fromkeys(map(os.path.normpath, paths)))
    for path in paths:
        parts, others = Path(path).parts, [f"/{other}" for other in paths if other != path]
        endings = ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        name = next((end for end in endings if not any(o.endswith(f"/{end}") for o in others)), path)
        names[name] = path
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
        from torch.nn.utils.rnn import pad_sequence

        scores = [torch.tensor(item["scores"]) for item in items]
        scores = pad_sequence(scores, batch_first=True, padding_value=ABSENT_SCORE)  # (B, R)
        apo_mask = torch.tensor([float(item["is_apo"]) for item in items])
        batch = {"scores": scores, "apo_mask": apo_mask}
        if "query_id" in items[0]:
            batch["query_ids"] = [item["query_id"] for item in items]
        return {**batch, **self.token_tensors([ids for item in items for ids in item["input_ids"]])}

    def token_tensors(self, sequences: list[list[int]]) -> dict[str, Any]:
        """Returns the tensors of a batch that depend on N sequences of token ids alone."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        if self.batching == "tree":
            from apo.tree import build_token_tree

            tree = build_token_tree(sequences)
            return {**{name: tree.pop(name) for name in ("input_ids", "attention_mask")}, "tree": tree}
        rows = [torch.as_tensor(ids, dtype=torch.long) for ids in sequences]
        options = {"batch_first": True, "padding_side": self.padding_side}
        return {
            "input_ids": pad_sequence(rows, padding_value=self.pad_token_id, **options),  # (N, T)
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in rows], **options),
        }
