"""The LLM of the game: a causal LM of transformers whose forward pass gives the log-probabilities of response tokens.

Dimension key: see `models.py`; M response tokens of a batch, all of them one after another.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import find_adapter_config_file

from apo.adapters import AdaptedModel, adapt, load_merged, refuse_adapter
from apo.cli import InputError, first_few
from apo.divergence import refuse_non_finite
from apo.launch import seeded
from apo.run_state import check_weights
from apo.tree import TREE_ATTENTIONS, batching_of, build_token_tree, prepare_attention

CHUNK_TOKENS = 512  # whose logits exist at a time
# Two sequences that share 8 tokens; the log-probabilities of the others tell whether two models are the same.
PROBE = [[3 + 7 * i % 41 for i in range(16)], [3 + 7 * i % 41 for i in range(8)] + [5 + 3 * i for i in range(12)]]
PROBE_PROMPT = 8


# ------------------------------------------------------------------------------------------------ head


def final_logits(hidden: Tensor, head: nn.Module, config: PreTrainedConfig) -> Tensor:
    """Vocabulary scores of last hidden states, (M, D) -> (M, V) float32, with what some models do after the head."""
    logits = head(hidden).float()
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def response_logprobs(hidden: Tensor, labels: Tensor, head: nn.Module, config: PreTrainedConfig) -> Tensor:
    """Log-probability of each label after its hidden state.

    The logits are computed for `CHUNK_TOKENS` tokens at a time, and again in the backward pass: of (M, V) floats no
    more than a chunk exists at a time. Those of the last chunk are kept, since the backward pass begins with them.
    Under ZeRO-3 all processes take equally many chunks, since each gathers the head.

    Args:
        hidden: (M, D) last hidden states that predict a token.
        labels: (M,) that token.
        head: the LM head, (M, D) -> (M, V).
        config: of the model; see `final_logits`.

    Returns:
        (M,) float32.
    """

    def logprobs_of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy(final_logits(hidden, head, config), labels, reduction="none")

    num_chunks = torch.tensor(-(-len(labels) // CHUNK_TOKENS), device=labels.device)
    if is_deepspeed_zero3_enabled() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(num_chunks, torch.distributed.ReduceOp.MAX)
    *others, last = zip(hidden.tensor_split(int(num_chunks)), labels.tensor_split(int(num_chunks)), strict=True)
    logprobs = [checkpoint(logprobs_of_chunk, *chunk, use_reentrant=False) for chunk in others]
    return torch.cat([*logprobs, logprobs_of_chunk(*last)])


# ------------------------------------------------------------------------------------------------ model


class PolicyForward:
    """The forward pass of a policy, put before a `*ForCausalLM` of transformers by `policy_class`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        tree: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Log-probabilities of the response tokens of a batch, as a tree or padded on the right.

        Args:
            input_ids: (1, S) with a tree, else (N, T).
            attention_mask: (N, T), 1 = token of the sequence.
            rows: (M,) index of the hidden state that predicts each response token, among S, or N*T. Without it this
                is the forward pass of transformers.
            labels: (M,) the response tokens.
            tree: the other tensors of `apo.tree.build_token_tree`; needs one of its attentions.

        Returns:
            (M,) float32. Padding and the tree change no log-probability.
        """
        if rows is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)
        if tree is None:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            inputs = {"attention_mask": attention_mask, "position_ids": positions}
        else:
            attend = prepare_attention(tree, self.config._attn_implementation)
            inputs = {"position_ids": tree["position_ids"], "attend": attend}
        hidden = self.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        predicting = hidden.flatten(0, 1).index_select(0, rows)  # (M, D)
        return response_logprobs(predicting, labels, self.get_output_embeddings(), self.config)


@functools.cache
def policy_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A `*ForCausalLM` with `PolicyForward`, under the same name, which saving records."""
    return type(base.__name__, (PolicyForward, base), {"__module__": base.__module__})


def token_tensors(sequences: list[list[int]], prompt_lengths: list[int], batching: str) -> dict[str, Any]:
    """Returns what `PolicyForward.forward` takes for N sequences, each a prompt of at least one token and a response.

    As a tree, the prompt "1 2" with the responses "3 4" and "5" becomes `input_ids` [[1, 2, 3, 4, 5]], `rows`
    [1, 2, 1] and `labels` [3, 4, 5]: the hidden state of token 2 predicts both 3 and 5. Padded, it becomes `input_ids`
    [[1, 2, 3, 4], [1, 2, 5, 0]] and `rows` [1, 2, 5].
    """
    tree = build_token_tree(sequences) if batching == "tree" else None
    if tree is None:
        ids = [torch.tensor(sequence) for sequence in sequences]
        pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
        inputs = {"input_ids": pad(ids), "attention_mask": pad([torch.ones_like(row) for row in ids])}
        paths = torch.arange(inputs["input_ids"].numel()).view_as(inputs["input_ids"])  # (N, T)
    else:
        inputs = {"input_ids": tree.pop("input_ids"), "attention_mask": tree.pop("attention_mask"), "tree": tree}
        paths = tree["paths"]
    borders = list(zip(prompt_lengths, map(len, sequences), strict=True))
    rows = [path[start - 1 : end - 1] for path, (start, end) in zip(paths, borders, strict=True)]
    labels = [
        token for sequence, (start, end) in zip(sequences, borders, strict=True) for token in sequence[start:end]
    ]
    return {**inputs, "rows": torch.cat(rows), "labels": torch.tensor(labels)}


# ------------------------------------------------------------------------------------------------ loading


def load_policy(
    path: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    lora: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> PreTrainedModel | AdaptedModel:
    """Loads a causal LM with the forward pass of a policy, and compares that with the one of transformers.

    Args:
        path: a model folder, or a name on the Hub.
        config: of `models.load_config`.
        dtype: of the weights.
        attention: of `apo.tree.choose_attention`.
        lora: flags of a new adapter to train, see `apo.adapters.adapt`; None without one.
        seed: of the adapter.

    Raises:
        InputError: weights that cannot be read, are incomplete or not finite, such as a reward model; an adapter; or a
            model whose log-probabilities this project does not compute as transformers does.
    """
    refuse_adapter(path)
    check_weights(path)
    cls = policy_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    try:
        model, info = cls.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: the weights cannot be loaded ({reason})") from error
    if missing := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        lacking = f"lacks {len(missing)} weights ({first_few(missing)})"
        raise InputError(f"{path}: the checkpoint {lacking}; expected a complete language model")
    refuse_non_finite(path, dict(model.named_parameters()))
    if not is_deepspeed_zero3_enabled():  # a process holds a part of the weights
        _check_forward(path, model.eval(), attention)
    if lora is None:
        return model
    with seeded(seed):
        return adapt(model, path, path, lora, num_base_tokens=model.get_input_embeddings().num_embeddings)


def _check_forward(path: str, model: PreTrainedModel, attention: str) -> None:
    ours = probe_logprobs(model)
    model.set_attn_implementation("eager")  # which every model has
    expected = plain_probe_logprobs(model)
    model.set_attn_implementation(attention)
    if not close_logprobs(ours, expected, 1e-3 if model.dtype == torch.float32 else 0.1):
        raise InputError(
            f"{path}: the log-probabilities of {model.config.model_type} come out other than transformers has them "
            f"(up to {(ours - expected).abs().max():.3g} apart); expected a model such as llama, qwen3, gemma2"
            + "; maybe --batching padded works"
            * (attention in TREE_ATTENTIONS)
        )


def close_logprobs(ours: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the log-probabilities of two models differ by no more than a share of the largest."""
    return bool((ours - expected).abs().max() <= tolerance * expected.abs().max())


@torch.no_grad()
def probe_logprobs(model: nn.Module) -> Tensor:
    """Log-probabilities of the tokens of `PROBE`, in the way of its attention: (M,) float32, on the CPU."""
    batching = batching_of(model.config._attn_implementation)
    inputs = token_tensors(PROBE, [PROBE_PROMPT] * len(PROBE), batching)
    device = next(model.parameters()).device
    tree = {"tree": {name: value.to(device) for name, value in inputs.pop("tree").items()}} if "tree" in inputs else {}
    return model(**{name: value.to(device) for name, value in inputs.items()}, **tree).float().cpu()


@torch.no_grad()
def plain_probe_logprobs(model: PreTrainedModel) -> Tensor:
    """The same from the logits of transformers, each sequence by itself."""
    logprobs = []
    for sequence in PROBE:
        ids = torch.tensor([sequence], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, PROBE_PROMPT - 1 : -1].float()
        logprobs.append(-F.cross_entropy(logits, ids[0, PROBE_PROMPT:], reduction="none").cpu())
    return torch.cat(logprobs)


def check_saved_policy(folder: str, logprobs: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """Reloads a model or an adapter that was just saved, and compares its log-probabilities of `PROBE`.

    Args:
        logprobs: those of the model in memory, (M,).
        dtype: of the weights.
        tolerance: largest difference, as a share of the largest; covers other kernels and 16-bit rounding.

    Raises:
        InputError: what was written is another model, or none.
    """
    load = load_merged if find_adapter_config_file(folder) else AutoModelForCausalLM.from_pretrained
    saved = plain_probe_logprobs(load(folder, dtype=dtype).eval())
    if not close_logprobs(saved, logprobs, tolerance):
        raise InputError(
            f"{folder}: the saved model gives other log-probabilities than the one in memory (up to "
            f"{(saved - logprobs).abs().max():.3g} apart); save it again, from the last whole checkpoint"
        )
