"""Log-probabilities of DPO's reference model: computed once, before the policy is loaded, and kept with the data."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object, send_to_device

from apo.batches import batch_by_tokens
from apo.evaluation import dtype_of_computation, token_budget
from apo.launch import whole_models
from apo.policy import MODEL_INPUTS, sum_logprobs
from apo.policy_data import PolicyDataCollator
from apo.policy_model import load_policy
from apo.row_cache import cache_path, cached_rows, is_whole
from apo.tree import batching_of

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

logger = logging.getLogger(__name__)


def add_reference_logps(
    data_sets: list[datasets.Dataset],
    path: str,
    config: PreTrainedConfig,
    args: TrainingArguments,
    *,
    version: str | None,
    dtype: torch.dtype,
    attention: str,
    max_length: int,
    cache_dir: str | None,
) -> list[datasets.Dataset]:
    """Adds the column `reference_logps` to each data set: a sum for each response, float32.

    The model is loaded, onto one device of each process, only if the cache lacks some, and is gone afterwards. All
    processes call this together and share the work.

    Args:
        data_sets: of `apo.policy_data.load_policy_dataset`.
        path, config, attention: see `apo.policy_model.load_policy`.
        args: of the training; the reference computes in its precision.
        version: what changes with the model; see `apo.resume.model_version`.
        dtype: of the weights; DeepSpeed rounds them to that of the computation.
        max_length: tokens of the longest possible sequence.
        cache_dir: of the tokenised data.
    """
    import datasets

    compute_dtype = dtype_of_computation(args, dtype)
    dtype = compute_dtype if args.deepspeed else dtype
    settings = [version, str(dtype), str(compute_dtype), attention]
    paths = [cache_path(cache_dir, "reference_logps", [hash_tokens(data), *settings]) for data in data_sets]
    missing = [i for i, file in enumerate(paths) if not all(gather_object([is_whole(file)]))]  # on any machine
    if missing:
        logger.info("reference log-probabilities of %s", path)
        with whole_models(args):
            model = load_policy(path, config, dtype=dtype, attention=attention).eval().to(args.device)
            for i in missing:
                with torch.autocast(args.device.type, compute_dtype, compute_dtype != dtype):
                    rows = compute_reference_logps(model, data_sets[i], args, token_budget(args, max_length))
                if args.local_process_index == 0:
                    columns = [{"reference_logps": row} for row in rows]
                    cached_rows(paths[i], lambda columns=columns: columns, _features(), path)
        del model
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        gather_object([None])  # the files are written
    columns = [datasets.Dataset.from_file(str(file)) for file in paths]
    return [datasets.concatenate_datasets(pair, axis=1) for pair in zip(data_sets, columns, strict=True)]


def hash_tokens(dataset: datasets.Dataset) -> str:
    """Returns a hash of all token ids of a data set."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["prompt_ids", "response_ids"]).iter(1000):
        digest.update(repr((batch["prompt_ids"], batch["response_ids"])).encode())
    return digest.hexdigest()


def _features() -> datasets.Features:
    import datasets

    return datasets.Features({"reference_logps": datasets.List(datasets.Value("float32"))})


@torch.no_grad()
def compute_reference_logps(
    model: PreTrainedModel, dataset: datasets.Dataset, args: TrainingArguments, budget: int
) -> list[list[float]]:
    """Returns the log-probabilities of all records, in order, on every process; each runs its share of the batches."""
    batching = batching_of(model.config._attn_implementation)
    collate = PolicyDataCollator(batching)
    rows: list[tuple[int, list[float]]] = []
    for indices in batch_by_tokens(dataset, budget, batching)[args.process_index :: args.world_size]:
        batch = send_to_device(collate([dataset[i] for i in indices]), args.device)
        logprobs = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
        logps = sum_logprobs(logprobs, batch["lengths"])
        rows += [(i, row[n > 0].tolist()) for i, row, n in zip(indices, logps, batch["lengths"], strict=True)]
    return [row for _, row in sorted(gather_object(rows))]
