"""Three implementations of the attention over a prefix tree (`apo.tree`), whose tokens are the row of S.

Token i sees token j iff j <= i < subtree_end[j], and in a layer with a sliding window of W also only if
position[j] > position[i] - W. A window thus counts positions of the separate sequences, not of the row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

MAX_PADDING = 1.5  # of a group of branches; below it, padding is cheaper than another call
BLOCK_SIZE = 128  # tokens of a block that flex attention computes or skips


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


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layer: Layer) -> Tensor:
    """Attention (n, H, Q, head size) with a mask that lets every query see a key, causal where the mask is None."""
    if layer.softcap is None and layer.sinks is None:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=layer.scaling)
    scores = query @ key.transpose(-2, -1) * layer.scaling  # (n, H, Q, K)
    if layer.softcap is not None:
        scores = _cap_scores(scores, layer.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.float().masked_fill(~mask, -torch.inf)
    output = scores.softmax(-1).to(value.dtype) @ value
    return output if layer.sinks is None else _add_sinks(output, scores.logsumexp(-1), layer.sinks)


def _cap_scores(scores: Tensor, softcap: float | Tensor) -> Tensor:
    return softcap * torch.tanh(scores / softcap)


def _add_sinks(output: Tensor, log_sum_exp: Tensor, sinks: Tensor) -> Tensor:
    """Adds the key of the sinks to attention (n, H, Q, head size), given the log-sum-exp (n, H, Q) of its scores."""
    share = torch.sigmoid(log_sum_exp - sinks[:, None])  # what the other keys keep: sum / (sum + exp(sink))
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


def prepare_branches(tree: dict[str, Tensor]) -> Attend:
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
        oldest = positions - window + 1  # a tensor: a number in a closure does not compile for rows of any length
    if size % BLOCK_SIZE:
        every[-1] = False  # queries beyond the row see nothing

    def attends(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < ends[j])

    def attends_in_window(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return attends(batch, head, i, j) & (positions[j] >= oldest[i])

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


def prepare_flex(tree: dict[str, Tensor]) -> Attend:
    """Flex attention over the row, which skips the empty blocks of the (S, S) mask."""
    ends, positions = tree["subtree_ends"], tree["position_ids"][0]
    flex = compiled_flex_attention() if ends.is_cuda else flex_attention

    @functools.cache
    def block_mask(window: int | None) -> BlockMask:
        return tree_block_mask(ends, positions, window)

    @functools.cache
    def cap_scores(softcap: float) -> Callable[..., Tensor]:
        cap = torch.tensor(softcap, device=ends.device)  # see `tree_block_mask`
        return lambda score, *_: _cap_scores(score, cap)

    def attend(query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        options = {"block_mask": block_mask(layer.window), "scale": layer.scaling}
        if layer.softcap is not None:
            options["score_mod"] = cap_scores(layer.softcap)
        if layer.sinks is None:
            return flex(query, key, value, **options)
        output, more = flex(query, key, value, **options, return_aux=AuxRequest(lse=True))
        return _add_sinks(output, more.lse, layer.sinks)

    return attend


def prepare_mask(tree: dict[str, Tensor]) -> Attend:
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
