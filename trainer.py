"""The losses and metrics of APO as free functions, and the Trainer that applies them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from apo.cli import InputError, first_few
from apo.divergence import GuardedTrainer
from apo.resumable import ResumableTrainer
from arguments import RewardTrainingArguments
from models import PROBES, RewardModelOutput, check_saved_model
from reward_datasets import batch_by_tokens

if TYPE_CHECKING:
    from datasets import Dataset

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
    return {
        f"calibration_ECE_bin{num_bins}": float(np.average(gaps, weights=curve["count"])),
        f"calibration_ACE_bin{num_bins}": float(gaps.mean()),
        f"calibration_MCE_bin{num_bins}": float(gaps.max()),
    }


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


def in_file_order(
    predictions: tuple[np.ndarray, ...], labels: tuple[np.ndarray, ...]
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Sorts gathered rows by the last of the labels, their index in the data set; drops repeated rows and index -1.

    The first of the labels are the scores, (B, R); where they mark an absent response the predictions become NaN.

    Raises:
        InputError: the prediction for a present response is not finite.
    """
    index, rows = np.unique(labels[-1], return_index=True)
    rows, index = rows[index >= 0], index[index >= 0]
    absent = labels[0][rows] < 0
    bad = index[(~np.isfinite(predictions[0][rows]) & ~absent).any(-1)] + 1
    if len(bad):
        found = f"{len(bad)} of {len(index)} records ({first_few([*map(str, bad)])}, counted from 1)"
        raise InputError(f"{found} got a reward that is not finite; the model diverged, or overflows in --dtype")
    return tuple(np.where(absent, np.nan, array[rows]) for array in predictions), tuple(x[rows] for x in labels)


class RewardModelTrainer(GuardedTrainer, ResumableTrainer):
    """Trains a `RewardModel` on batches of `RewardDataCollator`.

    Evaluation gathers the rewards of all pairs and computes metrics and loss over all of them, so that they depend
    neither on the batch size nor on the number of processes.
    """

    loss_is_scaled_for_ga = False  # `compute_loss` returns the mean of a micro-batch
    args: RewardTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute_metrics = self._compute_metrics
        self._window = TrainingWindow()
        self._batches: list[list[int]] | None = None  # those to predict; None: all of the data set
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

    def _loss_terms(self, rewards: Tensor, scores: Tensor, apo_mask: Tensor) -> dict[str, Tensor]:
        """The weighted terms whose sum is the preference loss, (B, R) -> scalars."""
        if self.args.task_type != "apo":
            return {"ranking_term": ranking_loss(rewards, scores)}
        names = ("rm_kl_coeff", "apo_loss_coeff", "apo_sample_num", "apo_loss_type")
        coefficients = {name: getattr(self.args, name) for name in names}
        human, golden = apo_loss(rewards, scores, apo_mask, **coefficients)
        return {"ranking_term": human, "apo_term": golden}

    def _lm_mask(self, scores: Tensor) -> Tensor | None:
        """The responses to model, those scored above the threshold: (B, R) -> (N,) bool (arXiv:2309.03126)."""
        return scores[scores >= 0] > self.args.lm_score_thresh if self.args.lm_loss_coeff > 0 else None

    def _lm_term(self, lm_losses: Tensor, scores: Tensor) -> Tensor:
        """Weighted mean of the LM losses of these responses, (N,) -> scalar."""
        return self.args.lm_loss_coeff * lm_losses.sum() / self._lm_mask(scores).sum().clamp(min=1)

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keeps the scores in float32: under DeepSpeed they would be rounded to bf16, and close ones would tie."""
        labels = {name: inputs[name].to(self.args.device) for name in ("scores", "apo_mask")}
        return {**super()._prepare_inputs(inputs), **labels}

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> RewardModelOutput:
        lm_mask = self._lm_mask(inputs["scores"])
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask", "tree") if name in inputs}
        return model(**tokens, lm_mask=lm_mask)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Mean loss over the pairs of a micro-batch."""
        output = self._forward(model, inputs)
        scores, apo_mask = inputs["scores"], inputs["apo_mask"]
        rewards = torch.zeros_like(scores).masked_scatter(scores >= 0, output["rewards"])  # (B, R)
        terms = self._loss_terms(rewards, scores, apo_mask)
        if self.args.lm_loss_coeff > 0:
            terms["lm_term"] = self._lm_term(output["lm_losses"], scores)
        self._window.add(rewards.detach(), scores, apo_mask, terms)
        return sum(terms.values())

    @property
    def eval_token_budget(self) -> int:
        """Tokens of a batch in evaluation and scoring, at most."""
        if self.args.eval_token_budget:
            return self.args.eval_token_budget
        pairs = 2 * self.model.settings.max_length * self.args.eval_batch_size
        return min(pairs, CPU_TOKEN_BUDGET) if self.args.device.type == "cpu" else pairs

    def eval_batches(self, dataset: Dataset) -> list[list[int]]:
        """Indices of the items of each batch, over all processes."""
        return batch_by_tokens(dataset, self.eval_token_budget, self.data_collator.batching)

    def predict_batches(self, dataset: Dataset, batches: list[list[int]]) -> dict[int, np.ndarray]:
        """Rewards (R,) of the items of some batches of a data set, by index."""
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
    ) -> tuple[None, tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
        """Returns no loss, (rewards[, lm_losses]) and (scores, apo_mask, index); (B, R) each, NaN at absent responses.

        B is that of the process with the most items; what fills it up elsewhere has the index -1.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            output = self._forward(model, inputs)
        scores = inputs["scores"]
        nan = torch.full_like(scores, torch.nan)
        names = ("rewards", "lm_losses") if self.args.lm_loss_coeff > 0 else ("rewards",)
        predictions = tuple(nan.masked_scatter(scores >= 0, output[name]) for name in names)
        labels = (scores, inputs["apo_mask"], inputs["index"])
        return None, *(self.accelerator.pad_across_processes(part, pad_index=-1) for part in (predictions, labels))

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics and loss of a whole data set; what the gathering padded counts as absent."""
        (rewards, *lm_losses), (scores, apo_mask, _) = in_file_order(prediction.predictions, prediction.label_ids)
        bins = self.args.calibration_bins if self.args.rm_calibration else None
        tensors = [torch.as_tensor(array, dtype=torch.float64) for array in (rewards, scores, apo_mask)]
        loss = sum(self._loss_terms(*tensors).values())
        if lm_losses:
            loss += self._lm_term(torch.as_tensor(lm_losses[0][scores >= 0], dtype=torch.float64), tensors[1])
        return {"loss": loss.item(), **preference_metrics(rewards, scores, bins)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy, margin and the terms of the loss since the last log to the training log.

        Steps per second of an evaluation are left out: they would count batches of `--per_device_eval_batch_size`.
        """
        if "loss" in logs:
            logs |= self._window.drain(self.accelerator)
        for name in [name for name in logs if name.startswith("eval") and name.endswith("_steps_per_second")]:
            del logs[name]
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]  # of a step that fp16 skips; JSON has no infinity
        super().log(logs, start_time)

    def _progress(self) -> dict[str, Any]:
        return {**super()._progress(), "window": self._window.state()}

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        super()._restore_progress(progress)
        self._window.restore(progress["window"], self.args.device)


class TrainingWindow:
    """Sums over the micro-batches since the last log, on the device, gathered only when logged."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, rewards: Tensor, scores: Tensor, apo_mask: Tensor, terms: dict[str, Tensor]) -> None:
        """Adds a micro-batch: rewards and scores (B, R), apo_mask (B,), the weighted terms of its loss."""
        pairs = preference_pairs(scores)
        differences = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~pairs, 0.0)
        golden = pairs & (apo_mask > 0)[:, None, None]
        values = {
            "batches": torch.ones((), device=rewards.device),
            "pairs": pairs.sum(),
            "correct": (differences > 0).sum(),
            "golden": golden.sum(),
            "golden_correct": ((differences > 0) & golden).sum(),
            "difference": differences.sum(),
            **{name: term.detach() for name, term in terms.items()},
        }
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Returns the means over all processes and resets the sums."""
        if not self._sums:
            return {}
        local = torch.stack(list(self._sums.values()))
        total = dict(zip(self._sums, accelerator.reduce(local, reduction="sum").tolist(), strict=True))
        logs = {name: total[name] / total["batches"] for name in total if name.endswith("_term")}
        logs["accuracy"] = total["correct"] / max(total["pairs"], 1)
        logs["margin"] = total["difference"] / max(total["pairs"], 1)
        if total["golden"]:
            logs["apo_accuracy"] = total["golden_correct"] / total["golden"]
        self._sums = {}
        return logs

    def state(self) -> dict[str, float]:
        """The sums, as JSON holds them."""
        return {name: value.item() for name, value in self._sums.items()}

    def restore(self, state: dict[str, float], device: torch.device) -> None:
        """Continues the sums of `state`."""
        self._sums = {name: torch.tensor(value, dtype=torch.double, device=device) for name, value in state.items()}
