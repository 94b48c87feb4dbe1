"""The losses and metrics of APO as free functions, and the Trainer that applies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apo.evaluation import Arrays, RecordTrainer, Tensors
from arguments import RewardTrainingArguments
from models import PROBES, RewardModel, RewardModelOutput, check_saved_model

if TYPE_CHECKING:
    from datasets import Dataset

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


class RewardModelTrainer(RecordTrainer):
    """Trains a `RewardModel` on batches of `RewardDataCollator`."""

    loss_is_scaled_for_ga = False  # `compute_loss` returns the mean of a micro-batch
    args: RewardTrainingArguments

    def __init__(self, *args: Any, model: RewardModel, **kwargs: Any) -> None:
        super().__init__(*args, model=model, max_length=model.settings.max_length, **kwargs)

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
        self.sums.add(batch_sums(rewards.detach(), scores, apo_mask, terms))
        return sum(terms.values())

    def predict_batch(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensors, Tensors]:
        """Returns (rewards[, lm_losses]), (B, R) each and NaN at absent responses, and (scores, apo_mask)."""
        output = self._forward(model, inputs)
        scores = inputs["scores"]
        nan = torch.full_like(scores, torch.nan)
        names = ("rewards", "lm_losses") if self.args.lm_loss_coeff > 0 else ("rewards",)
        predictions = tuple(nan.masked_scatter(scores >= 0, output[name]) for name in names)
        return predictions, (scores, inputs["apo_mask"])

    def metrics_of(self, predictions: Arrays, labels: Arrays) -> dict[str, float]:
        """Metrics and loss of a whole data set, from the arrays of `predict_batch`."""
        (rewards, *lm_losses), (scores, apo_mask, _) = predictions, labels
        bins = self.args.calibration_bins if self.args.rm_calibration else None
        tensors = [torch.as_tensor(array, dtype=torch.float64) for array in (rewards, scores, apo_mask)]
        loss = sum(self._loss_terms(*tensors).values())
        if lm_losses:
            loss += self._lm_term(torch.as_tensor(lm_losses[0][scores >= 0], dtype=torch.float64), tensors[1])
        return {"loss": loss.item(), **preference_metrics(rewards, scores, bins)}

    def metric_names(self, dataset: Dataset) -> list[str]:
        """Those of `preference_metrics`, which has fewer without pairs."""
        bins = self.args.calibration_bins if self.args.rm_calibration else None
        scores = np.array([[float(any(dataset["num_pairs"])), 0.0]])
        return list(preference_metrics(scores, scores, bins))

    def means(self, total: Mapping[str, float]) -> dict[str, float]:
        """Accuracy, margin and the terms of the loss since the last log, from the sums of `batch_sums`."""
        logs = {name: total[name] / total["batches"] for name in total if name.endswith("_term")}
        logs["accuracy"] = total["correct"] / max(total["pairs"], 1)
        logs["margin"] = total["difference"] / max(total["pairs"], 1)
        if total["golden"]:
            logs["apo_accuracy"] = total["golden_correct"] / total["golden"]
        return logs


def batch_sums(rewards: Tensor, scores: Tensor, apo_mask: Tensor, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over a micro-batch, scalars: rewards and scores (B, R), apo_mask (B,), the weighted terms of its loss."""
    pairs = preference_pairs(scores)
    differences = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~pairs, 0.0)
    golden = pairs & (apo_mask > 0)[:, None, None]
    return {
        "batches": torch.ones((), device=rewards.device),
        "pairs": pairs.sum(),
        "correct": (differences > 0).sum(),
        "golden": golden.sum(),
        "golden_correct": ((differences > 0) & golden).sum(),
        "difference": differences.sum(),
        **terms,
    }
