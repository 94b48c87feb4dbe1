"""The losses and metrics of APO as free functions, and the Trainer that applies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apo.evaluation import Arrays, Fractions, RecordTrainer, Tensors
from arguments import RewardTrainingArguments
from models import PROBES, RewardModel, check_saved_model

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


def logged_fractions(rewards: Tensor, scores: Tensor, apo_mask: Tensor, terms: dict[str, Tensor]) -> Fractions:
    """What is logged of a micro-batch: rewards and scores (B, R), apo_mask (B,), {name: term of its loss}."""
    pairs = preference_pairs(scores)
    golden = pairs & (apo_mask > 0)[:, None, None]
    differences = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~pairs, 0.0)
    correct = differences > 0
    return {
        "accuracy": (correct.sum(), pairs.sum()),
        "margin": (differences.sum(), pairs.sum()),
        "apo_accuracy": ((correct & golden).sum(), golden.sum()),
        **{name: (term, torch.ones_like(term)) for name, term in terms.items()},
    }


class RewardModelTrainer(RecordTrainer):
    """Trains a `RewardModel` on batches of `RewardDataCollator`."""

    loss_is_scaled_for_ga = False  # `compute_loss` returns the mean of a micro-batch
    prediction = "reward"
    args: RewardTrainingArguments

    def __init__(self, *args: Any, model: RewardModel, **kwargs: Any) -> None:
        super().__init__(*args, model=model, max_length=model.settings.max_length, **kwargs)

    @property
    def _calibration_bins(self) -> list[int] | None:
        return self.args.calibration_bins if self.args.rm_calibration else None

    def probe(self) -> list[float]:
        """Rewards of `PROBES`."""
        return self.model.score(*PROBES)

    def check_saved(self, folder: str, probed: list[float], tolerance: float) -> None:
        """See `check_saved_model`."""
        check_saved_model(folder, probed, self.model.dtype, tolerance)

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
        self.add_to_window(logged_fractions(predictions[0].detach(), scores, apo_mask, terms))
        return sum(terms.values())

    def predict_batch(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensors, Tensors]:
        """Returns what `_forward` does, and (scores, apo_mask)."""
        return self._forward(model, inputs), (inputs["scores"], inputs["apo_mask"])

    def metrics_of(self, predictions: Arrays, labels: Arrays) -> dict[str, float]:
        """Loss and metrics of a whole data set, from the arrays of `predict_batch`."""
        scores, apo_mask, *_ = labels
        tensors = (torch.as_tensor(array, dtype=torch.float64) for array in (scores, apo_mask, *predictions))
        loss = sum(self._loss_terms(*tensors).values()).item()
        return {"loss": loss, **preference_metrics(predictions[0], scores, self._calibration_bins)}

    def metric_names(self, dataset: Dataset) -> list[str]:
        """Those of `preference_metrics`, which has fewer without pairs."""
        scores = np.array([[float(any(dataset["num_pairs"])), 0.0]])
        return list(preference_metrics(scores, scores, self._calibration_bins))
