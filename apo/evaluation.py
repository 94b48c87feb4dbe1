"""What the trainers of both players share: evaluation over all records at once, and sums between two log entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from apo.batches import batch_by_tokens
from apo.cli import InputError, first_few
from apo.divergence import GuardedTrainer
from apo.resumable import ResumableTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

CPU_TOKEN_BUDGET = 2048  # larger batches do not fit the caches: at 8,192 tokens a token takes a tenth longer
Arrays = tuple[np.ndarray, ...]
Tensors = tuple[Tensor, ...]


def token_budget(args: TrainingArguments, max_length: int) -> int:
    """Tokens of a batch without a gradient, at most; `max_length` is that of the longest possible sequence."""
    if args.eval_token_budget:
        return args.eval_token_budget
    pairs = 2 * max_length * args.eval_batch_size
    return min(pairs, CPU_TOKEN_BUDGET) if args.device.type == "cpu" else pairs


def in_file_order(predictions: Arrays, labels: Arrays) -> tuple[Arrays, Arrays]:
    """Sorts gathered rows by the last of the labels, their index in the data set; drops repeated rows and index -1.

    The first of the labels is (B, R) and negative where a response is absent; there the predictions become NaN.

    Raises:
        InputError: the prediction for a present response is not finite.
    """
    index, rows = np.unique(labels[-1], return_index=True)
    rows, index = rows[index >= 0], index[index >= 0]
    absent = labels[0][rows] < 0
    bad = index[(~np.isfinite(predictions[0][rows]) & ~absent).any(-1)] + 1
    if len(bad):
        found = f"{len(bad)} of {len(index)} records ({first_few([*map(str, bad)])}, counted from 1)"
        raise InputError(f"{found} got a value that is not finite; the model diverged, or overflows in --dtype")
    return tuple(np.where(absent, np.nan, array[rows]) for array in predictions), tuple(x[rows] for x in labels)


class RecordTrainer(GuardedTrainer, ResumableTrainer):
    """Evaluates by batches of a token budget, and computes metrics and loss over all records of a set at once.

    So they depend neither on the batch size nor on the number of processes. A subclass says how to predict a batch
    (`predict_batch`), what follows from all predictions (`metrics_of`), and from the sums of `self.sums` (`means`).
    """

    def __init__(self, *args: Any, max_length: int, **kwargs: Any) -> None:
        """Takes what `transformers.Trainer` does, and the tokens of the longest possible sequence."""
        super().__init__(*args, **kwargs)
        self.max_length = max_length
        self.sums = Sums()
        self.compute_metrics = self._compute_metrics
        self._batches: list[list[int]] | None = None  # those to predict; None: all of the data set
        if self.args.metric_for_best_model:
            self._settle_best_metric()

    # ---- what a subclass defines

    def predict_batch(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensors, Tensors]:
        """Returns predictions and labels of a batch on the device, each (B, R) or (B,); see `in_file_order`."""
        raise NotImplementedError

    def metrics_of(self, predictions: Arrays, labels: Arrays) -> dict[str, float]:
        """Metrics of a whole data set, with its `loss`."""
        raise NotImplementedError

    def metric_names(self, dataset: Dataset) -> list[str]:
        """Names of the metrics of a data set, but for the loss."""
        raise NotImplementedError

    def means(self, total: Mapping[str, float]) -> dict[str, float]:
        """The entries of the log that follow from the sums over all processes since the last one."""
        raise NotImplementedError

    # ---- evaluation

    def _settle_best_metric(self) -> None:
        """Checks that `--metric_for_best_model` exists; the name of an only evaluation set may be left out."""
        wanted, sets = self.args.metric_for_best_model, self.eval_dataset
        names = [f"eval_{name}_{metric}" for name in sets for metric in ("loss", *self.metric_names(sets[name]))]
        known = {wanted, f"eval_{wanted}", *(f"eval_{name}_{wanted}" for name in sets if len(sets) == 1)}
        if not (found := known & set(names)):
            expected = f"expected one of {', '.join(names)}; a set without pairs has no accuracy"
            raise InputError(f"--metric_for_best_model {wanted}: no such metric; {expected}")
        self.args.metric_for_best_model = found.pop()

    def eval_batches(self, dataset: Dataset) -> list[list[int]]:
        """Indices of the items of each batch, over all processes."""
        return batch_by_tokens(dataset, token_budget(self.args, self.max_length), self.data_collator.batching)

    def predict_batches(self, dataset: Dataset, batches: list[list[int]]) -> dict[int, np.ndarray]:
        """The first of the predictions (R,) of the items of some batches of a data set, by index."""
        self._batches = batches
        try:
            output = self.predict(dataset)
        finally:
            self._batches = None
        return dict(zip(output.label_ids[-1].tolist(), output.predictions[0], strict=True))

    def get_eval_dataloader(self, eval_dataset: str | Dataset) -> DataLoader:
        """This process's share of the batches, each with the `index` (B,) of its items."""
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        batches = self.eval_batches(dataset) if self._batches is None else self._batches
        # All processes run equally many batches, since ZeRO-3 gathers weights in each; who lacks one repeats another.
        rank, world_size = self.args.process_index, self.args.world_size
        num_rounds = math.ceil(len(batches) / world_size)
        share = [batches[(i * world_size + rank) % len(batches)] for i in range(num_rounds)]

        def collate(indices: list[int]) -> dict[str, Any]:
            return {**self.data_collator([dataset[i] for i in indices]), "index": torch.tensor(indices)}

        return DataLoader(
            range(len(dataset)),
            batch_sampler=share,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
        )

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """See `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Returns predictions and labels in file order, each item once, however they were batched and distributed."""
        self.gather_function = self.accelerator.gather  # the other one would cut what it takes for repeated samples
        output = super().evaluation_loop(*args, **kwargs)
        predictions, labels = in_file_order(output.predictions, output.label_ids)
        return output._replace(predictions=predictions, label_ids=labels)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensors, Tensors]:
        """Returns no loss, and `predict_batch` with the index (B,) as the last label.

        B is that of the process with the most items; what fills it up elsewhere has the index -1.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            predictions, labels = self.predict_batch(model, inputs)
        parts = (predictions, (*labels, inputs["index"]))
        return None, *(self.accelerator.pad_across_processes(part, pad_index=-1) for part in parts)

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of a whole data set; what the gathering padded counts as absent."""
        return self.metrics_of(*in_file_order(prediction.predictions, prediction.label_ids))

    # ---- log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the sums since the last log give to the training log.

        Steps per second of an evaluation are left out: they would count batches of `--per_device_eval_batch_size`.
        """
        if "loss" in logs and (total := self.sums.drain(self.accelerator)):
            logs |= self.means(total)
        for name in [name for name in logs if name.startswith("eval") and name.endswith("_steps_per_second")]:
            del logs[name]
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]  # of a step that fp16 skips; JSON has no infinity
        super().log(logs, start_time)

    def _progress(self) -> dict[str, Any]:
        return {**super()._progress(), "sums": self.sums.state()}

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        super()._restore_progress(progress)
        self.sums.restore(progress["sums"], self.args.device)


class Sums:
    """Sums over the micro-batches since the last log, on the device, gathered only when logged."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the values of a micro-batch, scalars."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Returns the sums over all processes and starts anew."""
        if not self._sums:
            return {}
        local = torch.stack(list(self._sums.values()))
        total = dict(zip(self._sums, accelerator.reduce(local, reduction="sum").tolist(), strict=True))
        self._sums = {}
        return total

    def state(self) -> dict[str, float]:
        """The sums, as JSON holds them."""
        return {name: value.item() for name, value in self._sums.items()}

    def restore(self, state: dict[str, float], device: torch.device) -> None:
        """Continues the sums of `state`."""
        self._sums = {name: torch.tensor(value, dtype=torch.double, device=device) for name, value in state.items()}
