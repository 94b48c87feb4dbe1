"""A Trainer that ends a run whose numbers are not finite, and says when a run changed few weights."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from apo.cli import InputError, first_few

logger = logging.getLogger(__name__)

MIN_WEIGHTS_CHANGED = 0.5  # steps of 1e-6 change 2 % of bfloat16 weights, and nearly all float32 weights


def refuse_non_finite(place: str, weights: dict[str, Tensor]) -> None:
    """Raises an `InputError` if a weight is NaN or infinite. Those that ZeRO-3 shards are empty here."""
    bad = [name for name, w in weights.items() if w.numel() and not torch.stack(w.aminmax()).isfinite().all()]
    if bad:
        raise InputError(f"{place}: {len(bad)} of {len(weights)} weights are NaN or infinite ({first_few(bad)})")


def sample_weights(weights: list[Tensor]) -> Tensor:
    """Up to 1,000 values of each weight, all in one (n,), float32, on the CPU."""
    flat = [weight.detach().flatten() for weight in weights]
    return torch.cat([weight[:: math.ceil(len(weight) / 1000) or 1].float().cpu() for weight in flat])


class GuardedTrainer(Trainer):
    """Ends all processes at the first loss or gradient that is not finite, and neither saves nor resumes such weights.

    The batches may have the `query_ids` of their records.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._micro_batches: list[tuple[Tensor, list[str]]] = []  # of this step: loss, query ids

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains; but for ZeRO-3 the metrics get `weights_changed`, the share of a sample of the weights."""
        if is_deepspeed_zero3_enabled():  # each process has a part of some weights
            return super().train(*args, **kwargs)
        embedding = self.model.get_input_embeddings().weight  # of which a run sees few rows
        trained = [w for w in self.model.parameters() if w.requires_grad and w is not embedding]
        before = sample_weights(trained)
        output = super().train(*args, **kwargs)
        changed = output.metrics["weights_changed"] = (before != sample_weights(trained)).double().mean().item()
        if changed < MIN_WEIGHTS_CHANGED:
            text = "only %.1f %% of the weights changed: steps of --learning_rate %g are lost in %s weights"
            logger.warning(text, 100 * changed, self.args.learning_rate, str(self.model.dtype)[6:])
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Keeps the loss of a micro-batch until the end of the step."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._micro_batches.append((loss, inputs.get("query_ids", [])))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Looks at the losses and the gradient of a step, at once, since on a GPU each look waits.

        fp16 skips steps whose gradient overflows and halves its loss scale: below a scale of 1 that is divergence.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        losses, query_ids = zip(*self._micro_batches, strict=True)
        self._micro_batches = []
        scaler = self.accelerator.scaler
        may_skip = self.accelerator.mixed_precision == "fp16" and (scaler is None or scaler.get_scale() >= 1)
        norm = torch.as_tensor(0.0 if may_skip or grad_norm is None else grad_norm).to(losses[0])
        bad = ~torch.stack([*losses, norm]).isfinite()
        if self.accelerator.reduce(bad.any().float(), reduction="sum").item():
            bad_ids = [ids for ids, is_bad in zip(query_ids, bad, strict=False) if is_bad] or query_ids
            names = first_few([json.dumps(query_id) for ids in bad_ids for query_id in ids])
            raise InputError(
                f"step {self.state.global_step + 1}: the run diverged (loss {sum(losses):g}, gradient norm {norm:g}, "
                f"query ids {names}); nothing is saved; lower --learning_rate, or look at these records"
            )
        return grad_norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves finite weights only."""
        refuse_non_finite(f"{output_dir}: not saved", state_dict or self.model.state_dict())
        super()._save(output_dir, state_dict)
