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
function. Over-long sequences that are truncated at different places share no prefix, as in the reference.

There are three implementations of the attention, registered with transformers under the names of `TREE_ATTENTIONS`:
`tree_branches` for the CPU, `tree_flex` for CUDA, `tree_mask` where that fails.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import LlamaConfig

logger = logging.getLogger(__name__)

TREE_ATTENTIONS = ("tree_branches", "tree_flex", "tree_mask")
MAX_PADDING = 1.5  # of a group of branches; below it, padding is cheaper than another call


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


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    attend: Attend,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a tree, as transformers calls it.

    Args:
        module: the attention module that calls.
        query: (1, H, S, head size).
        key, value: (1, H, S, head size), or with fewer heads, each for a group of query heads.
        attention_mask: not used.
        attend: the function that `prepare_attention` returned for this batch.
        scaling: factor of the dot products.
        dropout: must be 0: a shared token has one state, not one per sequence.

    Returns:
        (1, S, H, head size), and None in place of the attention weights.
    """
    assert dropout == 0.0, dropout
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them in float32, as the rotation is
    group_size = query.shape[1] // key.shape[1]
    if group_size > 1:
        key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    return attend(query, key, value, scaling).transpose(1, 2), None


for _name in TREE_ATTENTIONS:
    AttentionInterface.register(_name, tree_attention)


def prepare_attention(tree: dict[str, Tensor], kind: str) -> Attend:
    """Prepares the attention of a batch, the same for every layer.

    Args:
        tree: of `build_token_tree`.
        kind: one of `TREE_ATTENTIONS`.

    Returns:
        A function of query, key, value (1, H, S, head size) and the scaling; it returns their attention.
    """
    prepare = {"tree_branches": _prepare_branches, "tree_flex": _prepare_flex, "tree_mask": _prepare_mask}
    return prepare[kind](tree)


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
    """One call for n branches: `query_index` (n, Q) and `key_index` (n, K), rows of the tree; `mask` (n, 1, Q, K), or
    None for causal attention over whole paths; `is_new` (n, Q), the queries whose output is used."""

    query_index: Tensor
    key_index: Tensor
    mask: Tensor | None
    is_new: Tensor


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
    num_queries, num_keys = int((length - first).max()), int(length.max())
    position = first[:, None] + torch.arange(num_queries, device=paths.device)  # (n, Q)
    needs_mask = group[0].first > 0
    mask = (torch.arange(num_keys, device=paths.device) <= position[:, :, None])[:, None] if needs_mask else None
    return AttentionCall(
        query_index=paths[sequence].gather(1, position.clamp(max=paths.shape[1] - 1)),
        key_index=paths[sequence, :num_keys],
        mask=mask,
        is_new=(position >= start[:, None]) & (position < length[:, None]),
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

    def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        queries = take(query, query_index, [call.query_index.shape for call in calls])  # (n, H, Q, head size) each
        key_shapes = [call.key_index.shape for call in calls]
        keys, values = take(key, key_index, key_shapes), take(value, key_index, key_shapes)  # (n, H, K, head size)
        outputs = []
        for call, q, k, v in zip(calls, queries, keys, values, strict=True):
            causal = call.mask is None
            output = F.scaled_dot_product_attention(q, k, v, call.mask, is_causal=causal, scale=scaling)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, sources).transpose(0, 1)[None]

    return attend


def _prepare_flex(tree: dict[str, Tensor]) -> Attend:
    """Flex attention over the row, which skips the empty blocks of the (S, S) mask.

    The search for these blocks takes a few (S, S) bool tensors, once a batch.
    """
    ends = tree["subtree_ends"]

    def attends(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < ends[j])

    block_mask = create_block_mask(attends, None, None, len(ends), len(ends), device=ends.device)
    flex = compiled_flex_attention() if ends.is_cuda else flex_attention
    return lambda query, key, value, scaling: flex(query, key, value, block_mask=block_mask, scale=scaling)


def _prepare_mask(tree: dict[str, Tensor]) -> Attend:
    """Scaled-dot-product attention over the row with an (S, S) mask."""
    ends = tree["subtree_ends"]
    index = torch.arange(len(ends), device=ends.device)
    mask = (index <= index[:, None]) & (index[:, None] < ends)
    return lambda query, key, value, scaling: F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Flex attention, compiled once for rows of any length."""
    return torch.compile(flex_attention, dynamic=True)


def choose_attention(config: LlamaConfig, batching: str, device: torch.device, dtype: torch.dtype) -> str:
    """Picks the attention of a model and logs it.

    Trees on a GPU use flex attention; where it does not compile, and on devices other than CPU and CUDA, attention
    with a mask. A model with attention dropout is padded, because a shared token cannot be dropped twice.

    Args:
        config: of the model.
        batching: `tree` or `padded`.
        device: where the model will run.
        dtype: in which it will compute there.

    Returns:
        One of `TREE_ATTENTIONS`, or `sdpa` for padded batches.
    """
    if batching == "padded" or config.attention_dropout > 0:
        reason = " (the model has attention dropout)" if batching == "tree" else ""
        logger.info("batching: padded, attention: sdpa%s", reason)
        return "sdpa"
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


def _try_flex(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Compiles and runs flex attention, forward and backward, at the head size of the model."""
    sequences = [list(range(200)), [*range(150), *range(300, 400)]]
    tree = {name: tensor.to(device) for name, tensor in build_token_tree(sequences).items()}
    attend = prepare_attention(tree, "tree_flex")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_attention_heads, len(tree["subtree_ends"]), head_size)
    query = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    attend(query, query, query, head_size**-0.5).sum().backward()
