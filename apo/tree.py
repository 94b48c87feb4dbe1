"""Tree batching: the sequences of a batch as one row of tokens, with every shared prefix once and without padding.

Sequences share prefixes: the responses of an item share its prompt, items may share a system prompt, and the pairs of
one golden response share that response. A batch becomes a prefix tree, written into a single row of S tokens in
depth-first order, so that the descendants of a token follow it:

    sequences   p0 p1 p2 a0 a1        token      p0 p1 p2 a0 a1 b0
                p0 p1 p2 b0           row index   0  1  2  3  4  5
                                      position    0  1  2  3  4  3
                                      subtree end 6  6  6  5  5  6

    token i attends to token j   iff   j <= i < subtree_end[j]: the tokens before it on its own path, and itself

Linear layers see a row without padding; only attention depends on the tree. Positions are those of the separate
sequences and every token attends to what it would attend to there, so for a model without dropout this is the same
function. A sliding window of W counts positions: token i then sees only j with position[j] > position[i] - W.
Over-long sequences that are truncated at different places share no prefix, as in the reference.

There are three implementations of the attention (`apo.tree_attention`), registered with transformers under the names
of `TREE_ATTENTIONS`: `tree_branches` for the CPU, `tree_flex` for CUDA, `tree_mask` where that fails. transformers
builds no mask for a name that it does not know, and passes what else a layer needs (window, soft cap, sinks) as
keywords. `TREE_MODELS` lists the architectures for which this is tested; all others are padded.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_MAPPING, AttentionInterface, PreTrainedConfig

from apo.tree_attention import Attend, Layer, prepare_branches, prepare_flex, prepare_mask

logger = logging.getLogger(__name__)

TREE_ATTENTIONS = ("tree_branches", "tree_flex", "tree_mask")

# The architectures whose trees are tested against padded rows, and what their layers may need besides a causal mask.
# Not here: a window that comes in the mask alone (qwen2_moe, llama4), noise (mixtral), ALiBi (bloom), no attention.
TREE_MODELS: dict[str, tuple[str, ...]] = {
    "cohere": (),
    "cohere2": ("window",),
    "gemma": (),
    "gemma2": ("window", "softcap"),
    "gemma3_text": ("window",),
    "gpt2": (),
    "gpt_neox": (),
    "gpt_oss": ("window", "sinks"),
    "granite": (),
    "llama": (),
    "mistral": ("window",),
    "olmo2": (),
    "olmo3": ("window",),
    "opt": (),
    "phi3": ("window",),
    "qwen2": ("window",),
    "qwen3": ("window",),
    "qwen3_moe": ("window",),
    "smollm3": ("window",),
}
# Fields of a config with "drop" in their name that concern heads which a reward model does not have.
DROPOUT_OF_OTHER_HEADS = ("classifier_dropout", "summary_first_dropout", "summary_last_dropout")


def common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """Number of tokens that two sequences have in common from their start."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def build_token_tree(sequences: list[list[int]]) -> dict[str, Tensor]:
    """Writes N sequences as one prefix tree of S tokens.

    The example above: `input_ids` [[p0 p1 p2 a0 a1 b0]], `position_ids` [[0 1 2 3 4 3]],
    `subtree_ends` [6 6 6 5 5 6], `paths` [[0 1 2 3 4], [0 1 2 5 0]], `attention_mask` [[1 1 1 1 1], [1 1 1 1 0]],
    `branches` [[0 5 5], [1 4 1]].

    Returns:
        `input_ids`, `position_ids` (1, S); `subtree_ends` (S,), the row index after the last descendant of a token;
        `paths` (N, T), the row indices of each sequence, in the order given, right-padded with 0, and their
        `attention_mask` (N, T); `branches` (N, 3), in row order: the sequence, its length, the tokens that it adds.
    """
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    total = sum(map(len, arrays))
    input_ids, position_ids, subtree_ends = (np.zeros(total, dtype=np.int64) for _ in range(3))
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(arrays)
    branches = []
    size, path, previous = 0, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for i in sorted(range(len(sequences)), key=sequences.__getitem__):
        shared = common_prefix_length(previous, arrays[i])
        num_new = len(arrays[i]) - shared
        input_ids[size : size + num_new] = arrays[i][shared:]
        position_ids[size : size + num_new] = np.arange(shared, len(arrays[i]))
        subtree_ends[path[shared:]] = size
        path = np.concatenate([path[:shared], np.arange(size, size + num_new)])
        paths[i], previous = path, arrays[i]
        branches.append((i, len(arrays[i]), num_new))
        size += num_new
    subtree_ends[path] = size
    row_indices = [torch.from_numpy(path) for path in paths]
    return {
        "input_ids": torch.from_numpy(input_ids[None, :size]),
        "position_ids": torch.from_numpy(position_ids[None, :size]),
        "subtree_ends": torch.from_numpy(subtree_ends[:size]),
        "paths": pad_sequence(row_indices, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(path) for path in row_indices], batch_first=True),
        "branches": torch.tensor(branches),
    }


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    attend: Attend,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a tree, as transformers calls it.

    Args:
        module: the attention module that calls.
        query: (1, H, S, head size).
        key, value: (1, H, S, head size), or with fewer heads, each for a group of query heads.
        attention_mask: must be None: the tree decides who sees whom.
        attend: the function that `prepare_attention` returned for this batch.
        scaling: factor of the dot products, by default 1 / sqrt(head size).
        dropout: must be 0: a shared token has one state, not one per sequence.
        sliding_window, softcap, s_aux: `window`, `softcap` and `sinks` of `Layer`.

    Returns:
        (1, S, H, head size), and None in place of the attention weights.
    """
    assert attention_mask is None and dropout == 0.0, (attention_mask, dropout)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them in float32, as the rotation is
    group_size = query.shape[1] // key.shape[1]
    if group_size > 1:
        key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, Layer(scaling, sliding_window, softcap, s_aux)).transpose(1, 2), None


for _name in TREE_ATTENTIONS:
    AttentionInterface.register(_name, tree_attention)


def prepare_attention(tree: dict[str, Tensor], kind: str) -> Attend:
    """Prepares the attention of a batch for all layers.

    Args:
        tree: of `build_token_tree`.
        kind: one of `TREE_ATTENTIONS`.

    Returns:
        A function of query, key, value (1, H, S, head size) and the layer; it returns their attention.
    """
    prepare = {"tree_branches": prepare_branches, "tree_flex": prepare_flex, "tree_mask": prepare_mask}
    attend, longest = prepare[kind](tree), tree["paths"].shape[1]

    def attend_in_layer(query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        if layer.window is not None and layer.window >= longest:
            layer = replace(layer, window=None)
        return attend(query, key, value, layer)

    return attend_in_layer


def batching_of(attention: str) -> str:
    """How batches are made for an attention: `tree` or `padded`."""
    return "tree" if attention in TREE_ATTENTIONS else "padded"


def choose_attention(config: PreTrainedConfig, batching: str, device: torch.device, dtype: torch.dtype) -> str:
    """Picks the attention of a model and logs it.

    Trees on a GPU use flex attention; where it does not compile, and on devices other than CPU and CUDA, attention
    with a mask. Models for which trees are not the same function as padded rows, or not known to be, are padded.

    Args:
        config: of the model.
        batching: `tree` or `padded`.
        device: where the model will run.
        dtype: in which it will compute there.

    Returns:
        One of `TREE_ATTENTIONS`, or for padded batches `sdpa`, or `eager` where the model does not support it.
    """
    obstacle = _find_obstacle(config) if batching == "tree" else None
    if batching == "padded" or obstacle:
        kind = "sdpa" if MODEL_MAPPING[type(config)]._supports_sdpa else "eager"
        logger.info("batching: padded, attention: %s%s", kind, f" ({obstacle})" if obstacle else "")
        return kind
    kind = {"cpu": "tree_branches", "cuda": "tree_flex"}.get(device.type, "tree_mask")
    if kind == "tree_flex":
        try:
            try_flex(config, device, dtype)
        except Exception as error:  # compilers, drivers and cards fail in many ways
            kind = "tree_mask"
            logger.warning(
                "flex attention does not work here (%s); using tree_mask", " ".join(str(error).split())[:200]
            )
    logger.info("batching: tree, attention: %s", kind)
    return kind


def _find_obstacle(config: PreTrainedConfig) -> str | None:
    """Says why a model is not run on trees, or None."""
    if config.model_type not in TREE_MODELS:
        return f"trees are not tested for models of type {config.model_type}"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "the model is not causal"
    # A shared token has one state; it cannot be dropped in one sequence and kept in another.
    fields = {name: value for name, value in config.to_dict().items() if "drop" in name and value}
    dropout = [f"{name} {value}" for name, value in fields.items() if name not in DROPOUT_OF_OTHER_HEADS]
    return f"the model has dropout: {', '.join(dropout)}" if dropout else None


def try_flex(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Compiles and runs flex attention, forward and backward, as the layers of the model use it."""
    sequences = [list(range(200)), [*range(150), *range(300, 400)]]
    tree = {name: tensor.to(device) for name, tensor in build_token_tree(sequences).items()}
    attend = prepare_attention(tree, "tree_flex")
    num_heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    features = TREE_MODELS[config.model_type]
    layer = Layer(
        scaling=head_size**-0.5,
        window=config.sliding_window if "window" in features else None,
        softcap=config.attn_logit_softcapping if "softcap" in features else None,
        sinks=torch.zeros(num_heads, device=device, dtype=dtype) if "sinks" in features else None,
    )
    shape = (1, num_heads, len(tree["subtree_ends"]), head_size)
    query = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    attend(query, query, query, layer).sum().backward()
