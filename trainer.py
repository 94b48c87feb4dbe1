"""The losses and metrics of APO as free functions, and the Trainer that applies them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from apo.cli import InputError, first_few
from apo.divergence import GuardedTrainer
from apo.resumable import ResumableTrainer
from arguments import RewardTrainingArguments
from models import PROBES, check_saved_model
from reward_datasets import batch_by_tokens

CPU_TOKEN_BUDGET = 2048  # larger batches do not fit the caches: at 8,192 tokens a token takes a tenth longer


# ------------------------------------------------------------------------------------------------ losses


def preference_pairs(scores: Tensor) -> Tensor:
    """Marks the ordered pairs (i, j) of each item in which response i is preferred to response j.

    Args:
        scores: (B, R) preference scores, -1 where a response is absent.

    Returns:
        (B, R, R) bool.
    """
    present = scores >= 0
    return (scores[:, :, None] > scores[:, None, :]) & present[:, None, :]


def ranking_loss(rewards: Tensor, scores: Tensor, weights: Tensor | None = None, loss_type: str = "ranking") -> Tensor:
    """Pairwise preference loss -log sigmoid(r_i - r_j) over all pairs with score_i > score_j (Eq. 2, 2311.08045).

    Args:
        rewards: (B, R).
        scores: (B, R) preference scores, -1 where a response is absent.
        weights: (B,) weight of each item's pairs; all 1 if absent.
        loss_type: `ranking`, or `diff` for the plain difference r_j - r_i, the unbounded game of Eq. 12.

    Returns:
        Scalar: the weighted sum over pairs, divided by the number of all pairs whatever their weight, as the reference
        does; 0 where there is no pair.
    """
    assert rewards.shape == scores.shape, (rewards.shape, scores.shape)
    pairs = preference_pairs(scores)  # (B, R, R)
    rewards = rewards.masked_fill(scores < 0, 0.0)
    differences = rewards[:, :, None] - rewards[:, None, :]  # (B, R, R)
    losses = -differences if loss_type == "diff" else F.softplus(-differences)
    losses = losses.masked_fill(~pairs, 0.0)
    if weights is not None:
        losses = losses * weights[:, None, None]
    return losses.sum() / pairs.sum().clamp(min=1)


def apo_loss(
    rewards: Tensor,
    scores: Tensor,
    apo_mask: Tensor,
    *,
    rm_kl_coeff: float,
    apo_loss_coeff: float,
    apo_sample_num: int,
    apo_loss_type: str,
) -> tuple[Tensor, Tensor]:
    """The two weighted terms of the reward model's loss in the game (Eq. 17, arXiv:2311.08045); their sum is the loss.

    Departs from the paper as the reference does: the golden-over-sampled term carries the coefficient, divided by the
    number of sampled responses per golden response, and the term on human pairs takes the place of the KL constraint.

    Args:
        rewards: (B, R).
        scores: (B, R) preference scores, -1 where a response is absent.
        apo_mask: (B,) 1 for golden-over-sampled items, 0 for human preferences.
        rm_kl_coeff: weight of the human pairs.
        apo_loss_coeff: weight of the golden-over-sampled pairs, before the division by `apo_sample_num`.
        apo_sample_num: sampled responses per golden response in the data.
        apo_loss_type: `ranking` or `diff`, see `ranking_loss`.

    Returns:
        (human term, golden term), scalars: each is a sum over its pairs, divided by the number of pairs of both kinds
        in the batch.
    """
    human = ranking_loss(rewards, scores, 1.0 - apo_mask)
    golden = ranking_loss(rewards, scores, apo_mask, apo_loss_type)
    return rm_kl_coeff * human, apo_loss_coeff / apo_sample_num * golden


# ------------------------------------------------------------------------------------------------ metrics


def calibration_curve(rewards: np.ndarray, scores: np.ndarray, num_bins: int) -> dict[str, np.ndarray]:
    """Bins the predicted preference probabilities sigmoid(r_i - r_j) of all responses i, j with different scores.

    Args:
        rewards, scores: (B, R), -1 in `scores` where a response is absent.
        num_bins: bins of equal width on [0, 1].

    Returns:
        Per non-empty bin: `count`, mean `confidence` and `accuracy`, the share in which i is preferred.
    """
    preferred = preference_pairs(torch.as_tensor(scores)).numpy()
    item, chosen, rejected = preferred.nonzero()
    difference = rewards[item, chosen].astype(np.float64) - rewards[item, rejected]
    win = np.exp(-np.logaddexp(0.0, -difference))
    probability = np.concatenate([win, 1.0 - win])  # both orders of each pair
    correct = np.concatenate([np.ones_like(win), np.zeros_like(win)])
    bins = np.clip(np.ceil(probability * num_bins).astype(int) - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    used = count > 0
    return {
        "count": count[used],
        "confidence": np.bincount(bins, probability, num_bins)[used] / count[used],
        "accuracy": np.bincount(bins, correct, num_bins)[used] / count[used],
    }


def calibration_errors(rewards: np.ndarray, scores: np.ndarray, num_bins: int) -> dict[str, float]:
    """Expected (weighted by count), average (over non-empty bins) and maximal calibration error."""
    curve = calibration_curve(rewards, scores, num_bins)
    gaps = np.abs(curve["accuracy"] - curve["confidence"])
    errors = {"ECE": np.average(gaps, weights=curve["count"]), "ACE": gaps.mean(), "MCE": gaps.max()}
    return {f"calibration_{name}_bin{num_bins}": float(error) for name, error in errors.items()}


def preference_metrics(
    rewards: np.ndarray, scores: np.ndarray, calibration_bins: list[int] | None = None
) -> dict[str, float]:
    """Metrics over all ordered pairs of a data set, under the reference's names and under plain ones.

    Args:
        rewards: (B, R); NaN where no reward was computed.
        scores: (B, R) preference scores, -1 where a response is absent.
        calibration_bins: numbers of bins for the calibration errors; none if absent or empty.

    Returns:
        `Preference Acc` = `accuracy`: share of pairs with r_i > r_j, a tie is wrong. `Avg Score`: mean of all rewards
        given; `mean_reward`: that of the present responses. `margin`: mean r_i - r_j. `pairs`, `ties`: counts.
        Without a single pair only the rewards are reported.
    """
    metrics = {"Avg Score": float(np.nanmean(rewards)), "mean_reward": float(rewards[scores >= 0].mean())}
    item, chosen, rejected = preference_pairs(torch.as_tensor(scores)).numpy().nonzero()
    metrics |= {"pairs": len(item), "ties": 0}
    if not len(item):
        return metrics
    difference = rewards[item, chosen] - rewards[item, rejected]
    metrics["Preference Acc"] = metrics["accuracy"] = float((difference > 0).mean())
    metrics["margin"] = float(difference.mean())
    metrics["ties"] = int((difference == 0).sum())
    for num_bins in calibration_bins or []:
        metrics |= calibration_errors(rewards, scores, num_bins)
    return metrics


# ------------------------------------------------------------------------------------------------ trainer


def logged_fractions(rewards: Tensor, scores: Tensor, apo_mask: Tensor, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is logged of a micro-batch: (B, R), (B, R), (B,), {name: term of the loss} -> {name: (2,) float64}.

    The two are a sum and what it is divided by, once they are added up over micro-batches and processes.
    """
    pairs = preference_pairs(scores)
    golden = pairs & (apo_mask > 0)[:, None, None]
    differences = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~pairs, 0.0)
    correct = differences > 0
    fractions = {
        "accuracy": (correct.sum(), pairs.sum()),
        "margin": (differences.sum(), pairs.sum()),
        "apo_accuracy": ((correct & golden).sum(), golden.sum()),
        **{name: (term.detach(), torch.ones_like(term)) for name, term in terms.items()},
    }
    return {name: torch.stack([part.double() for part in fraction]) for name, fraction in fractions.items()}


class RewardModelTrainer(GuardedTrainer, ResumableTrainer):
    """Trains a `RewardModel` on batches of `RewardDataCollator`.

    Evaluation gathers the rewards of all pairs and computes metrics and loss over all of them, so that they depend
    neither on the batch size nor on the number of processes.
    """

    loss_is_scaled_for_ga = False  # `compute_loss` returns the mean of a micro-batch
    args: RewardTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.metric_for_best_model:
            self._settle_best_metric()

    def _settle_best_metric(self) -> None:
        """Checks that `--metric_for_best_model` exists; the name of an only evaluation set may be left out."""
        wanted, sets = self.args.metric_for_best_model, self.eval_dataset
        bins = self.args.calibration_bins if self.args.rm_calibration else None
        scores = {name: np.array([[float(any(sets[name]["num_pairs"])), 0.0]]) for name in sets}
        names = [f"eval_{s}_{m}" for s in sets for m in ("loss", *preference_metrics(scores[s], scores[s], bins))]
        known = {wanted, f"eval_{wanted}", *(f"eval_{name}_{wanted}" for name in sets if len(sets) == 1)}
        if not (found := known & set(names)):
            expected = f"expected one of {', '.join(names)}; a set without pairs has no accuracy"
            raise InputError(f"--metric_for_best_model {wanted}: no such metric; {expected}")
        self.args.metric_for_best_model = found.pop()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and compares the rewards of what was written with those of the model in memory.

        All processes compute rewards, since ZeRO-3 gathers weights in each; the main one reloads, on the CPU.
        """
        was_training = self.model.training
        self.model.eval()
        rewards = self.model.score(*PROBES)
        self.model.train(was_training)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            is_exact = self.model.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
            check_saved_model(output_dir or self.args.output_dir, rewards, self.model.dtype, 1e-3 if is_exact else 0.1)

    def _lm_mask(self, scores: Tensor) -> Tensor | None:
        """The responses to model, those scored above the threshold: (B, R) -> (N,) bool (arXiv:2309.03126)."""
        return scores[scores >= 0] > self.args.lm_score_thresh if self.args.lm_loss_coeff > 0 else None

    def _loss_terms(self, scores: Tensor, apo_mask: Tensor, rewards: Tensor, *lm_losses: Tensor) -> dict[str, Tensor]:
        """The weighted terms whose sum is the loss, scalars, from (B, R), (B,) and what `_forward` returns."""
        if self.args.task_type == "apo":
            names = ("rm_kl_coeff", "apo_loss_coeff", "apo_sample_num", "apo_loss_type")
            coefficients = {name: getattr(self.args, name) for name in names}
            human, golden = apo_loss(rewards, scores, apo_mask, **coefficients)
            terms = {"ranking_term": human, "apo_term": golden}
        else:
            terms = {"ranking_term": ranking_loss(rewards, scores)}
        for losses in lm_losses:  # a mean over the responses to model; the losses of the others are 0
            num_modelled = self._lm_mask(scores).sum().clamp(min=1)
            terms["lm_term"] = self.args.lm_loss_coeff * losses[scores >= 0].sum() / num_modelled
        return terms

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keeps the scores in float32: under DeepSpeed they would be rounded to bf16, and close ones would tie."""
        labels = {name: inputs[name].to(self.args.device) for name in ("scores", "apo_mask")}
        return {**super()._prepare_inputs(inputs), **labels}

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(rewards[, lm_losses]), (B, R) each, NaN at absent responses."""
        scores = inputs["scores"]
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask", "tree") if name in inputs}
        output = model(**tokens, lm_mask=self._lm_mask(scores))
        nan = torch.full_like(scores, torch.nan)
        return tuple(nan.masked_scatter(scores >= 0, values) for values in output.values())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Mean loss over the pairs of a micro-batch."""
        predictions = self._forward(model, inputs)
        scores, apo_mask = inputs["scores"], inputs["apo_mask"]
        terms = self._loss_terms(scores, apo_mask, *predictions)
        for name, value in logged_fractions(predictions[0].detach(), scores, apo_mask, terms).items():
            self.window[name] = self.window.get(name, 0.0) + value
        return sum(terms.values())

    def eval_batches(self, dataset: Dataset) -> list[list[int]]:
        """Indices of the items of each batch in evaluation and scoring, over all processes."""
        pairs = 2 * self.model.settings.max_length * self.args.eval_batch_size
        default = min(pairs, CPU_TOKEN_BUDGET) if self.args.device.type == "cpu" else pairs
        return batch_by_tokens(dataset, self.args.eval_token_budget or default, self.data_collator.batching)

    def predict_batches(self, dataset: Dataset, batches: list[list[int]]) -> dict[int, np.ndarray]:
        """Rewards (R,) of the items of some batches of a data set, by index."""
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
        """Returns predictions and labels in file order, each item once, and the metrics over all pairs at once.

        Raises:
            InputError: the reward of a present response is not finite.
        """
        self.gather_function = self.accelerator.gather  # the other one would cut what it takes for repeated samples
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        index, rows = np.unique(output.label_ids[-1], return_index=True)
        rows = rows[index >= 0]  # -1 fills up the share of a process
        scores, apo_mask, index = labels = tuple(array[rows] for array in output.label_ids)
        absent = scores < 0  # also where gathering fills up
        predictions = tuple(np.where(absent, np.nan, array[rows]) for array in output.predictions)
        bad = index[(~np.isfinite(predictions[0]) & ~absent).any(-1)] + 1
        if len(bad):
            found = f"{len(bad)} of {len(index)} records ({first_few([*map(str, bad)])}, counted from 1)"
            raise InputError(f"{found} got a reward that is not finite; the model diverged, or overflows in --dtype")
        tensors = (torch.as_tensor(array, dtype=torch.float64) for array in (scores, apo_mask, *predictions))
        bins = self.args.calibration_bins if self.args.rm_calibration else None
        loss = sum(self._loss_terms(*tensors).values()).item()
        metrics = {"loss": loss, **preference_metrics(predictions[0], scores, bins)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()} | output.metrics
        return output._replace(predictions=predictions, label_ids=labels, metrics=metrics)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[None, tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
        """Returns no loss, what `_forward` returns, and (scores, apo_mask, index).

        B is that of the process with the most items; what fills it up elsewhere has the index -1.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            predictions = self._forward(model, inputs)
        labels = (inputs["scores"], inputs["apo_mask"], inputs["index"])
        return None, *(self.accelerator.pad_across_processes(part, pad_index=-1) for part in (predictions, labels))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy, margin and the terms of the loss since the last log to the training log.

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
