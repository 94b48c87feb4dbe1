"""The LLM's losses and metrics as free functions, and the Trainer that applies them.

The responses of an item are in order of their reward, the best first. `B`, `R`: see `models.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apo.adapters import AdaptedModel, merge
from apo.evaluation import Arrays, Fractions, RecordTrainer, Tensors
from apo.launch import whole_models
from apo.policy_model import check_saved_policy, probe_logprobs

if TYPE_CHECKING:
    from datasets import Dataset

MODEL_INPUTS = ("input_ids", "attention_mask", "rows", "labels", "tree")  # of a batch


# ------------------------------------------------------------------------------------------------ losses


def sft_loss(logps: Tensor, lengths: Tensor) -> Tensor:
    """Mean next-token negative log-likelihood of responses: `rjs` on the best sampled one, `sft` on the golden one.

    Args:
        logps: (B,) summed over the tokens of a response.
        lengths: (B,) number of these tokens.

    Returns:
        Scalar: the mean over all tokens of all B responses, as in TRL's SFT, so that a long response weighs more.
    """
    return -logps.sum() / lengths.sum()


def dpo_loss(logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation (Eq. 7, arXiv:2305.18290): -log sigmoid of the margin of implicit rewards.

        margin = beta * ((log pi(best) - log ref(best)) - (log pi(worst) - log ref(worst)))

    Args:
        logps: (B, 2) log-probabilities of the best and the worst response, summed over their tokens.
        reference_logps: (B, 2) those of the reference model.
        beta: weight of the KL constraint.

    Returns:
        Scalar: the mean over the B pairs.
    """
    implicit_rewards = beta * (logps - reference_logps)  # (B, 2)
    return -F.logsigmoid(implicit_rewards[:, 0] - implicit_rewards[:, 1]).mean()


def preferred_pairs(scores: Tensor, lengths: Tensor) -> Tensor:
    """Marks the pairs (i, j) of each item in which response i has the higher score: (B, R), (B, R) -> (B, R, R) bool.

    Ties form no pair, nor do absent responses, whose length is 0.
    """
    present = lengths > 0
    return (scores[:, :, None] > scores[:, None, :]) & present[:, :, None] & present[:, None, :]


def rrhf_loss(logps: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    """Rank responses to align human feedback (Eqs. 2 to 4, arXiv:2304.05302).

        p_i = logp_i / length_i
        loss of a prompt = sum over pairs with score_i > score_j of max(0, p_j - p_i), minus p_best

    By hand: p = [-1.0, -0.5, -2.0] and scores [3, 2, 2] have the pairs (0, 1), which costs 0.5, and (0, 2), which
    costs 0; responses 1 and 2 are a tie. With 1.0 for the best, the loss is 1.5.

    Args:
        logps: (B, R) summed over the tokens of a response.
        lengths: (B, R) number of these tokens, 0 where a response is absent.
        scores: (B, R) rewards; the best is the first of the highest.

    Returns:
        Scalar: the mean over the B prompts; the hinge is summed over a prompt's pairs, as in the paper.
    """
    p = logps / lengths.clamp(min=1)
    hinge = F.relu(p[:, None, :] - p[:, :, None])  # (B, R, R): p_j - p_i
    ranking = (hinge * preferred_pairs(scores, lengths)).sum((1, 2))  # (B,)
    best = scores.masked_fill(lengths == 0, -torch.inf).argmax(1, keepdim=True)
    return (ranking - p.gather(1, best).squeeze(1)).mean()


# ------------------------------------------------------------------------------------------------ metrics


def alignment_fractions(values: Tensor, lengths: Tensor, scores: Tensor) -> Fractions:
    """Metrics of some items; sums over items divide to the metrics of them all.

    Args:
        values: (B, R) what should be higher for a higher score: implicit rewards, or length-normalised
            log-probabilities.
        lengths, scores: as in `rrhf_loss`.

    Returns:
        `response_length`: mean tokens of a response, eos included; `accuracy`: share of the ordered pairs whose better
        response has the higher value, a tie is wrong; `reward_weighted_accuracy`: the same, each pair weighted by its
        difference in reward; `margin`: mean difference of the values. Without a pair, all but the first are 0 / 0.
    """
    pairs = preferred_pairs(scores, lengths)
    difference = (values[:, :, None] - values[:, None, :]).masked_fill(~pairs, 0.0)  # (B, R, R): v_i - v_j
    weights = (scores[:, :, None] - scores[:, None, :]).masked_fill(~pairs, 0.0)
    correct = difference > 0
    return {
        "response_length": (lengths.sum(), (lengths > 0).sum()),
        "accuracy": (correct.sum(), pairs.sum()),
        "reward_weighted_accuracy": ((weights * correct).sum(), weights.sum()),
        "margin": (difference.sum(), pairs.sum()),
    }


def alignment_metrics(values: Tensor, lengths: Tensor, scores: Tensor) -> dict[str, float]:
    """The quotients of `alignment_fractions` and the number of `pairs`; without a pair only the length."""
    fractions = alignment_fractions(values, lengths, scores)
    metrics = {name: (total / count).item() for name, (total, count) in fractions.items() if count}
    return metrics | ({"pairs": fractions["accuracy"][1].item()} if "accuracy" in metrics else {})


# ------------------------------------------------------------------------------------------------ trainer


def sum_logprobs(logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Log-probabilities of responses: (M,) of their tokens, one response after another -> (B, R), 0 if absent."""
    present = lengths > 0
    sums = [part.sum() for part in logprobs.split(lengths[present].tolist())]
    return torch.zeros_like(lengths, dtype=logprobs.dtype).masked_scatter(present, torch.stack(sums))


class PolicyTrainer(RecordTrainer):
    """Aligns a policy of `apo.policy_model` on batches of `apo.policy_data.PolicyDataCollator`.

    The loss of an optimizer step is that of all its records as one batch, however they are divided into micro-batches
    and processes; the loss of an evaluation is that of all records of its file.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` returns a part of the loss of a step
    prediction = "log-probability"

    def __init__(self, *args: Any, align_type: str, beta: float, **kwargs: Any) -> None:
        """Takes what `RecordTrainer` does, `align_type`: rjs, sft, dpo or rrhf, and beta of dpo."""
        self.align_type, self.beta = align_type, beta
        super().__init__(*args, **kwargs)

    def loss(self, logps: Tensor, lengths: Tensor, scores: Tensor, reference_logps: Tensor) -> Tensor:
        """The loss of a batch, (B, R) each -> scalar."""
        if self.align_type == "dpo":
            return dpo_loss(logps, reference_logps, self.beta)
        if self.align_type == "rrhf":
            return rrhf_loss(logps, lengths, scores)
        return sft_loss(logps[:, 0], lengths[:, 0])

    def values(self, logps: Tensor, lengths: Tensor, reference_logps: Tensor) -> Tensor:
        """What the metrics compare, (B, R): implicit rewards of dpo, else log-probabilities per token."""
        return self.beta * (logps - reference_logps) if self.align_type == "dpo" else logps / lengths.clamp(min=1)

    def _count_items(self, lengths: Tensor) -> Tensor:
        """What the loss is a mean over, (B, R) -> scalar: response tokens, or records."""
        return lengths.sum() if self.align_type in ("rjs", "sft") else torch.tensor(len(lengths))

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """The items of a step, over its micro-batches and all processes."""
        local = sum((self._count_items(batch["lengths"]) for batch in batch_samples), torch.tensor(0)).to(device)
        return self.accelerator.reduce(local, reduction="sum")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keeps scores and reference log-probabilities as they are: DeepSpeed would round them to bf16."""
        names = ("scores", "reference_logps")
        return {**super()._prepare_inputs(inputs), **{name: inputs[name].to(self.args.device) for name in names}}

    def _logps(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        logprobs = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs})
        return sum_logprobs(logprobs, inputs["lengths"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """This micro-batch's part of the loss of a step, times the number of processes, over which DDP averages."""
        logps, lengths, scores = self._logps(model, inputs), inputs["lengths"], inputs["scores"]
        reference_logps = inputs["reference_logps"]
        values = self.values(logps.detach(), lengths, reference_logps)
        self.add_to_window(alignment_fractions(values, lengths, scores))
        share = self._count_items(lengths) / num_items_in_batch
        return self.loss(logps, lengths, scores, reference_logps) * share * self.args.world_size

    def predict_batch(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensors, Tensors]:
        """Returns log-probabilities; and lengths (-1 if absent), scores, reference log-probabilities: (B, R) each."""
        lengths = inputs["lengths"]
        labels = (lengths.masked_fill(lengths == 0, -1), inputs["scores"], inputs["reference_logps"])
        return (self._logps(model, inputs),), labels

    def metrics_of(self, predictions: Arrays, labels: Arrays) -> dict[str, float]:
        """Loss and metrics of a whole data set, in float64."""
        logps, lengths, scores, reference_logps = (
            torch.as_tensor(array).double().nan_to_num() for array in (*predictions, *labels[:3])
        )
        lengths = lengths.clamp(min=0)
        metrics = alignment_metrics(self.values(logps, lengths, reference_logps), lengths, scores)
        return {"loss": self.loss(logps, lengths, scores, reference_logps).item(), **metrics}

    def metric_names(self, dataset: Dataset) -> list[str]:
        """Those of `alignment_metrics`, which has fewer without pairs."""
        has_pairs = any(len(set(scores)) > 1 for scores in dataset["scores"][:])
        scores = torch.tensor([[float(has_pairs), 0.0]])
        return list(alignment_metrics(scores, torch.ones_like(scores), scores))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves the model; an adapter as such in checkpoints, and merged in the output folder, for other programs."""
        super()._save(output_dir, state_dict)
        is_last = output_dir == self.args.output_dir
        if is_last and isinstance(self.model, AdaptedModel) and self.args.should_save:
            with whole_models(self.args):
                merge(output_dir, self.model.dtype)

    def probe(self) -> list[float]:
        """Log-probabilities of `apo.policy_model.PROBE`."""
        return probe_logprobs(self.model).tolist()

    def check_saved(self, folder: str, probed: list[float], tolerance: float) -> None:
        """See `check_saved_policy`."""
        check_saved_policy(folder, torch.tensor(probed), self.model.dtype, tolerance)
