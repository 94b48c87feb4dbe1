"""What the trainers of both players share: evaluation over all records, the check of what is saved, the log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from apo.batches import batch_by_tokens
from apo.cli import InputError, first_few, write_json
from apo.divergence import GuardedTrainer
from apo.launch import whole_models
from apo.resumable import ResumableTrainer
from apo.run_files import write_results

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

CPU_TOKEN_BUDGET = 2048  # larger batches do not fit the caches: at 8,192 tokens a token takes a tenth longer
Arrays = tuple[np.ndarray, ...]
Tensors = tuple[Tensor, ...]
Fractions = dict[str, tuple[Tensor, Tensor]]  # sums over some items, and what they are divided by: scalars


def dtype_of_computation(args: TrainingArguments, dtype: torch.dtype) -> torch.dtype:
    """In which type a model with weights of `dtype` computes."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else dtype


def token_budget(args: TrainingArguments, max_length: int) -> int:
    """Tokens of a batch without a gradient, at most; `max_length` is that of the longest possible sequence."""
    pairs = 2 * max_length * args.eval_batch_size
    default = min(pairs, CPU_TOKEN_BUDGET) if args.device.type == "cpu" else pairs
    return args.eval_token_budget or default


class RecordTrainer(GuardedTrainer, ResumableTrainer):
    """Evaluates by batches of a token budget, and computes metrics and loss over all records of a set at once.

    So they depend neither on the batch size nor on the number of processes. A subclass computes the loss of a
    micro-batch (`compute_loss`, with `add_to_window`), says what it predicts and what follows from that, and computes
    numbers that tell its model from any other.
    """

    prediction: str  # what the first of the predictions is called in messages

    def __init__(self, *args: Any, max_length: int, **kwargs: Any) -> None:
        """Takes what `transformers.Trainer` does, and the tokens of the longest possible sequence."""
        super().__init__(*args, **kwargs)
        assert bool(self.args.deepspeed) == self.is_deepspeed_enabled, "the DeepSpeed config was dropped"
        self.max_length = max_length
        if self.args.metric_for_best_model:
            self._settle_best_metric()

    # ---- what a subclass defines

    def predict_batch(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensors, Tensors]:
        """Returns predictions (B, R) and labels of a batch; the first label (B, R) is negative at absent responses."""
        raise NotImplementedError

    def metrics_of(self, predictions: Arrays, labels: Arrays) -> dict[str, float]:
        """Returns the metrics of a whole data set, with its `loss`; predictions are NaN at absent responses."""
        raise NotImplementedError

    def metric_names(self, dataset: Dataset) -> list[str]:
        """Names of the metrics of a data set, but for the loss."""
        raise NotImplementedError

    def probe(self) -> list[float]:
        """Returns numbers that tell the model in memory from another; all processes call it."""
        raise NotImplementedError

    def check_saved(self, folder: str, probed: list[float], tolerance: float) -> None:
        """Raises an InputError if the model in a folder gives other numbers, by a share of the largest.

        It draws no random number, which a resumed run would draw again.
        """
        raise NotImplementedError

    # ---- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and compares what was written with the model in memory.

        All processes compute the numbers, since ZeRO-3 gathers weights in each; the main one reloads, on the CPU.
        """
        was_training = self.model.training
        self.model.eval()
        probed = self.probe()
        self.model.train(was_training)
        if not all(map(math.isfinite, probed)):
            raise InputError(
                f"step {self.state.global_step}: the run diverged (a {self.prediction} is NaN or infinite); nothing "
                "is saved; lower --learning_rate"
            )
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            is_exact = self.model.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
            with whole_models(self.args):
                self.check_saved(output_dir or self.args.output_dir, probed, 1e-3 if is_exact else 0.1)

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
        """Indices of the items of each batch in evaluation and scoring, over all processes."""
        return batch_by_tokens(dataset, token_budget(self.args, self.max_length), self.data_collator.batching)

    def predict_batches(self, dataset: Dataset, batches: list[list[int]]) -> dict[int, np.ndarray]:
        """The first of the predictions (R,) of the items of some batches of a data set, by index."""
        output = self.evaluation_loop(self.get_eval_dataloader(dataset, batches), description="Prediction")
        return dict(zip(output.label_ids[-1].tolist(), output.predictions[0], strict=True))

    def get_eval_dataloader(self, eval_dataset: str | Dataset, batches: list[list[int]] | None = None) -> DataLoader:
        """This process's share of the batches (default: `eval_batches`); each has the `index` (B,) of its items."""
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        batches = self.eval_batches(dataset) if batches is None else batches
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

    get_test_dataloader = get_eval_dataloader  # of `predict`

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Returns predictions and labels in file order, each item once, and the metrics over all records at once.

        Raises:
            InputError: the prediction for a present response is not finite.
        """
        self.gather_function = self.accelerator.gather  # the other one would cut what it takes for repeated samples
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        index, rows = np.unique(output.label_ids[-1], return_index=True)
        labels = tuple(array[rows[index >= 0]] for array in output.label_ids)  # -1 fills up the share of a process
        absent = labels[0] < 0  # also where gathering fills up
        predictions = tuple(np.where(absent, np.nan, array[rows[index >= 0]]) for array in output.predictions)
        bad = labels[-1][(~np.isfinite(predictions[0]) & ~absent).any(-1)] + 1
        if len(bad):
            found = f"{len(bad)} of {len(absent)} records ({first_few([*map(str, bad)])}, counted from 1)"
            raise InputError(
                f"{found} got a {self.prediction} that is not finite; the model diverged, or overflows in --dtype"
            )
        metrics = self.metrics_of(predictions, labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()} | output.metrics
        return output._replace(predictions=predictions, label_ids=labels, metrics=metrics)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[None, Tensors, Tensors]:
        """Returns no loss, and `predict_batch` with the index (B,) as the last label.

        B is that of the process with the most items; what fills it up elsewhere has the index -1.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            predictions, labels = self.predict_batch(model, inputs)
        parts = (predictions, (*labels, inputs["index"]))
        return None, *(self.accelerator.pad_across_processes(part, pad_index=-1) for part in parts)

    # ---- log

    def add_to_window(self, fractions: Fractions) -> None:
        """Adds what is to be logged of a micro-batch; the log has the quotient of the sums, over all processes."""
        for name, fraction in fractions.items():
            self.window[name] = self.window.get(name, 0.0) + torch.stack([part.detach().double() for part in fraction])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what `add_to_window` collected since the last log to the training log.

        Steps per second of an evaluation are left out: they would count batches of `--per_device_eval_batch_size`.
        """
        if "loss" in logs:
            sums = self.accelerator.reduce(torch.stack(list(self.window.values())), reduction="sum").tolist()
            logs |= {name: total / count for name, (total, count) in zip(self.window, sums, strict=True) if count}
            self.window = {}
        for name in [name for name in logs if name.startswith("eval") and name.endswith("_steps_per_second")]:
            del logs[name]
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]  # of a step that fp16 skips; JSON has no infinity
        super().log(logs, start_time)


def evaluate_all(trainer: RecordTrainer, **remarks: str) -> dict[str, PredictionOutput]:
    """Evaluates each set of a trainer under its own name, and writes the metrics, and remarks on all of them.

    Returns:
        {name: predictions, labels, and the metrics that are logged}.
    """
    trainer.remove_callback(PrinterCallback)  # a table says it in less
    outputs = {}
    for name, eval_set in trainer.eval_dataset.items():
        output = trainer.predict(eval_set, metric_key_prefix=f"eval_{name}")
        logs = dict(output.metrics)
        trainer.log(logs)
        outputs[name] = output._replace(metrics={key: logs[key] for key in output.metrics if key in logs})
    if trainer.is_world_process_zero():
        results = {name: output.metrics for name, output in outputs.items()}
        write_json(Path(trainer.args.output_dir, "final_eval_results.json"), results)
        flat = {key: value for metrics in results.values() for key, value in metrics.items()}
        write_results(trainer.args.output_dir, "eval", remarks | flat)
    return outputs
