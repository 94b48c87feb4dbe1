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

There are three implementations of the attention, registered with transformers under the names of `TREE_ATTENTIONS`:
`tree_branches` for the CPU, `tree_flex` for CUDA, `tree_mask` where that fails. transformers builds no mask for a name
that it does not know, and passes what else a layer needs (window, soft cap, sinks) as keywords. `TREE_MODELS` lists
the architectures for which this is tested; all others are padded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_MAPPING, AttentionInterface, PreTrainedConfig

logger = logging.getLogger(__name__)

TREE_ATTENTIONS = ("tree_branches", "tree_flex", "tree_mask")
MAX_PADDING = 1.5  # of a group of branches; below it, padding is cheaper than another call
BLOCK_SIZE = 128  # tokens of a block that flex attention computes or skips

# The architectures whose trees are tested against padded rows, and what their layers may need besides a causal mask.
# Not here: windows that come in the mask alone (qwen2_moe, llama4), ALiBi, Mamba.
TREE_MODELS: dict[str, tuple[str, ...]] = {
    "gemma2": ("window", "softcap"),
    "gemma3_text": ("window",),
    "gpt2": (),
    "gpt_neox": (),
    "gpt_oss": ("window", "sinks"),
    "granite": (),
    "llama": (),
    "mistral": ("window",),
    "olmo2": (),
    "opt": (),
    "phi3": ("window",),
    "qwen2": ("window",),
    "qwen3": ("window",),
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


@dataclass(frozen=True)
class Layer:
    """What the attention of one layer depends on besides the tree.

    `scaling` is the factor of the dot products. A token sees the `window` positions up to its own, or all. `softcap`
    bounds the scores to +-softcap. `sinks` (H,) are the scores of one more key per head, whose value is 0.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


Attend = Callable[[Tensor, Tensor, Tensor, Layer], Tensor]


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
    prepare = {"tree_branches": _prepare_branches, "tree_flex": _prepare_flex, "tree_mask": _prepare_mask}
    attend, longest = prepare[kind](tree), tree["paths"].shape[1]

    def attend_in_layer(query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        if layer.window is not None and layer.window >= longest:
            layer = replace(layer, window=None)
        return attend(query, key, value, layer)

    return attend_in_layer


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layer: Layer) -> Tensor:
    """Attention (n, H, Q, head size) with a mask that lets every query see a key, causal where the mask is None."""
    if layer.softcap is None and layer.sinks is None:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=layer.scaling)
    scores = query @ key.transpose(-2, -1) * layer.scaling  # (n, H, Q, K)
    if layer.softcap is not None:
        scores = _cap(layer.softcap)(scores)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.float().masked_fill(~mask, -torch.inf)
    output = scores.softmax(-1).to(value.dtype) @ value
    return output if layer.sinks is None else _add_sinks(output, scores.logsumexp(-1), layer.sinks)


@functools.cache
def _cap(softcap: float) -> Callable[..., Tensor]:
    """Soft-capping of attention scores, in the form that flex attention asks for; one function for equal caps."""
    return lambda scores, *_: softcap * torch.tanh(scores / softcap)


def _add_sinks(output: Tensor, log_sum_exp: Tensor, sinks: Tensor) -> Tensor:
    """Adds the key of a sink, whose value is 0, to attention (n, H, Q, head size) with sums of scores (n, H, Q)."""
    share = torch.sigmoid(log_sum_exp - sinks[:, None])  # exp(sum) / (exp(sum) + exp(sink))
    return (output * share[..., None]).to(output.dtype)


def _take(states: Tensor, index: Tensor) -> Tensor:
    """Some rows of states (1, H, S, head size): (rows, H, head size)."""
    return states[0].transpose(0, 1).index_select(0, index)


@dataclass(frozen=True)
class Branch:
    """A sequence of `length` tokens, new in the row from position `start`, queried from `first`, 0 or `start`."""

    sequence: int
    length: int
    start: int
    first: int


@dataclass(frozen=True)
class AttentionCall:
    """One call for n branches: `query_index` (n, Q) and `key_index` (n, K), rows of the tree; `position` (n, Q) of the
    queries; `is_new` (n, Q), those whose output is used; `is_whole`, whether all paths are queried as a whole."""

    query_index: Tensor
    key_index: Tensor
    position: Tensor
    is_new: Tensor
    is_whole: bool

    def mask(self, window: int | None) -> Tensor | None:
        """The keys that each query sees, (n, 1, Q, K); None for causal attention."""
        num_keys = self.key_index.shape[1]
        if self.is_whole and (window is None or window >= num_keys):
            return None
        position, key_position = self.position[:, :, None], torch.arange(num_keys, device=self.position.device)
        mask = key_position <= position
        if window is not None:
            mask &= key_position > position - window
        return mask[:, None]


def _group_branches(tree: dict[str, Tensor]) -> list[list[Branch]]:
    """Divides the branches into groups for one call of attention each.

    A path that is mostly new is queried as a whole: causal attention costs half as much. A group grows while
    what it attends to, padding included, stays below `MAX_PADDING` times what its branches need.
    """
    branches = []
    for i, length, num_new in tree["branches"].tolist():
        start = length - num_new
        if num_new:
            branches.append(Branch(i, length, start, first=0 if 2 * start < length else start))
    groups: list[list[Branch]] = []
    needed = 0
    for branch in sorted(branches, key=lambda b: (b.first > 0, b.first - b.length, -b.length)):
        needed += (branch.length - branch.first) * branch.length
        if groups and (groups[-1][0].first > 0) == (branch.first > 0):
            members = [*groups[-1], branch]
            widest = max(b.length - b.first for b in members) * max(b.length for b in members)
            if len(members) * widest <= MAX_PADDING * needed:
                groups[-1].append(branch)
                continue
        groups.append([branch])
        needed = (branch.length - branch.first) * branch.length
    return groups


def _make_call(paths: Tensor, group: list[Branch]) -> AttentionCall:
    fields = [[b.sequence, b.length, b.start, b.first] for b in group]
    sequence, length, start, first = torch.tensor(fields, device=paths.device).unbind(1)  # (n,) each
    offset = torch.arange(int((length - first).max()), device=paths.device)
    position = torch.minimum(first[:, None] + offset, length[:, None] - 1)  # (n, Q), at the end the last one again
    return AttentionCall(
        query_index=paths[sequence].gather(1, position),
        key_index=paths[sequence, : int(length.max())],
        position=position,
        is_new=(offset >= (start - first)[:, None]) & (offset < (length - first)[:, None]),
        is_whole=group[0].first == 0,
    )


def _prepare_branches(tree: dict[str, Tensor]) -> Attend:
    """The new tokens of each sequence attend to its path, sequences of similar lengths in one call.

    The rows of all calls are gathered at once, because each gather has a gradient as large as the tree.
    """
    calls = [_make_call(tree["paths"], group) for group in _group_branches(tree)]
    query_index, key_index = (
        torch.cat([x.flatten() for x in indices])
        for indices in ([call.query_index for call in calls], [call.key_index for call in calls])
    )
    rows = torch.cat([call.query_index[call.is_new] for call in calls])
    sources = torch.cat([call.is_new.flatten() for call in calls]).nonzero().squeeze(1)[rows.argsort()]  # (S,)

    def take(states: Tensor, index: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
        parts = _take(states, index).split([shape.numel() for shape in shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]

    @functools.cache
    def masks(window: int | None) -> list[Tensor | None]:
        return [call.mask(window) for call in calls]

    def attend(query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        queries = take(query, query_index, [call.query_index.shape for call in calls])  # (n, H, Q, head size) each
        key_shapes = [call.key_index.shape for call in calls]
        keys, values = take(key, key_index, key_shapes), take(value, key_index, key_shapes)  # (n, H, K, head size)
        outputs = []
        for q, k, v, mask in zip(queries, keys, values, masks(layer.window), strict=True):
            outputs.append(_attention(q, k, v, mask, layer).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, sources).transpose(0, 1)[None]

    return attend


def tree_block_mask(ends: Tensor, positions: Tensor, window: int | None) -> BlockMask:
    """The mask of flex attention, whose blocks are empty, full or partial, in O((S / 128)^2) time and memory.

    Without a window the blocks are those of `create_block_mask`, which takes O(S^2); with one, some empty blocks count
    as partial.

    Args:
        ends, positions: (S,), `subtree_ends` and `position_ids` of a tree.
        window: of `Layer`.
    """
    size = len(ends)
    blocks = torch.arange(-(-size // BLOCK_SIZE) * BLOCK_SIZE, device=ends.device).clamp(max=size - 1)
    blocks = blocks.view(-1, BLOCK_SIZE)  # row indices, the last one repeated
    first, last = blocks[:, :1], blocks[:, -1:]  # of a block of queries
    least_end, greatest_end = ends[blocks].aminmax(dim=1)  # of a block of keys
    some = (first >= first.T) & (greatest_end > first)
    every = (first > first.T) & (least_end > last)
    if window is not None:
        least, greatest = positions[blocks].aminmax(dim=1)
        some &= least[:, None] - greatest < window
        every &= greatest[:, None] - least < window
    if size % BLOCK_SIZE:
        every[-1] = False  # queries beyond the row see nothing

    def attends(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < ends[j])

    def attends_in_window(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return attends(batch, head, i, j) & (positions[j] > positions[i] - window)

    return BlockMask.from_kv_blocks(
        *_list_blocks(some & ~every),
        *_list_blocks(every),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=attends if window is None else attends_in_window,
        seq_lengths=(size, size),
    )


def _list_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number (1, 1, n) of blocks of keys that each of n blocks of queries has, and (1, 1, n, n) these first."""
    number = blocks.sum(1, dtype=torch.int32)
    return number[None, None], blocks.int().argsort(dim=1, descending=True, stable=True).int()[None, None]


def _prepare_flex(tree: dict[str, Tensor]) -> Attend:
    """Flex attention over the row, which skips the empty blocks of the (S, S) mask."""
    ends, positions = tree["subtree_ends"], tree["position_ids"][0]
    flex = compiled_flex_attention() if ends.is_cuda else flex_attention

    @functools.cache
    def block_mask(window: int | None) -> BlockMask:
        return tree_block_mask(ends, positions, window)

    def attend(query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        options = {"block_mask": block_mask(layer.window), "scale": layer.scaling}
        if layer.softcap is not None:
            options["score_mod"] = _cap(layer.softcap)
        if layer.sinks is None:
            return flex(query, key, value, **options)
        output, more = flex(query, key, value, **options, return_aux=AuxRequest(lse=True))
        return _add_sinks(output, more.lse, layer.sinks)

    return attend


def _prepare_mask(tree: dict[str, Tensor]) -> Attend:
    """Attention over the row with an (S, S) mask."""
    ends, positions = tree["subtree_ends"], tree["position_ids"][0]

    @functools.cache
    def mask(window: int | None) -> Tensor:
        index = torch.arange(len(ends), device=ends.device)
        attends = (index <= index[:, None]) & (index[:, None] < ends)
        return attends if window is None else attends & (positions > positions[:, None] - window)

    return lambda query, key, value, layer: _attention(query, key, value, mask(layer.window), layer)


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Flex attention, compiled once for rows of any length."""
    return torch.compile(flex_attention, dynamic=True)


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
            _try_flex(config, device, dtype)
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


def _try_flex(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
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
