"""The attention of a tree is that of its sequences one by one, with windows, soft caps and sinks."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from apo.tree import TREE_ATTENTIONS, build_token_tree, prepare_attention
from apo.tree_attention import BLOCK_SIZE, Layer, tree_block_mask

NUM_HEADS, HEAD_SIZE = 2, 4
LAYERS = {
    "plain": {},
    "window of 1": {"window": 1},
    "window of 7": {"window": 7},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": torch.tensor([0.5, -2.0], dtype=torch.float64)},
    "all": {"window": 5, "softcap": 0.8, "sinks": torch.tensor([0.5, -2.0], dtype=torch.float64)},
}


def random_tree(seed: int, max_length: int, num_sequences: int = 12) -> dict[str, torch.Tensor]:
    """Sequences that leave an earlier one anywhere, or share nothing with it."""
    rng = np.random.default_rng(seed)
    sequences: list[list[int]] = []
    for _ in range(num_sequences):
        start = sequences[rng.integers(len(sequences))] if sequences else []
        new = rng.integers(0, 1000, size=rng.integers(1, max_length)).tolist()
        sequences.append([*start[: rng.integers(len(start) + 1)], *new][:max_length])
    return build_token_tree(sequences)


def attend_one_by_one(tree: dict, states: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Written as loops over sequences, heads and queries; query, key and value (3, H, S, head size)."""
    output = torch.zeros_like(states[0])
    for path, mask in zip(tree["paths"], tree["attention_mask"], strict=True):
        path = path[mask.bool()]
        for head in range(NUM_HEADS):
            query, key, value = states[:, head, path]
            for i in range(len(path)):
                first = 0 if layer.window is None else max(0, i - layer.window + 1)
                scores = layer.scaling * key[first : i + 1] @ query[i]
                if layer.softcap is not None:
                    scores = layer.softcap * torch.tanh(scores / layer.softcap)
                weights = scores.exp()
                sink = 0.0 if layer.sinks is None else layer.sinks[head].exp()
                output[head, path[i]] = weights @ value[first : i + 1] / (weights.sum() + sink)
    return output


@pytest.mark.parametrize("kind", TREE_ATTENTIONS)
@pytest.mark.parametrize("features", LAYERS.values(), ids=LAYERS)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_is_that_of_each_sequence_alone(kind, features):
    layer = Layer(scaling=0.7, **features)
    for seed in range(3):
        tree = random_tree(seed, max_length=20)
        torch.manual_seed(seed)
        states = torch.randn(3, NUM_HEADS, len(tree["subtree_ends"]), HEAD_SIZE, dtype=torch.float64)
        attend = prepare_attention(tree, kind)
        output = attend(*(x[None] for x in states), layer)[0]
        torch.testing.assert_close(output, attend_one_by_one(tree, states, layer), rtol=0, atol=1e-6)


def blocks_of(block_mask, kind: str) -> torch.Tensor:
    """`full` or partial (the empty name) blocks as (queries, keys) bool."""
    number = getattr(block_mask, f"{kind}kv_num_blocks")[0, 0]
    indices = getattr(block_mask, f"{kind}kv_indices")[0, 0]
    blocks = torch.zeros(indices.shape, dtype=torch.bool)
    for row, count, index in zip(blocks, number, indices, strict=True):
        row[index[:count].long()] = True
    return blocks


def dense_mask(tree: dict, window: int | None) -> torch.Tensor:
    index, ends, positions = torch.arange(len(tree["subtree_ends"])), tree["subtree_ends"], tree["position_ids"][0]
    mask = (index <= index[:, None]) & (index[:, None] < ends)
    return mask if window is None else mask & (positions[:, None] - positions < window)


@pytest.mark.parametrize("max_length", [9, 10, 128, 700])
def test_blocks_of_flex_attention_are_those_of_the_dense_mask(max_length):
    """Rows of less than one block, of exactly one, of many."""
    for seed in range(5):
        tree = random_tree(seed, max_length, num_sequences=1 if max_length == 128 else 12)
        ends, positions = tree["subtree_ends"], tree["position_ids"][0]
        expected = create_block_mask(
            lambda batch, head, i, j, ends=ends: (j <= i) & (i < ends[j]), None, None, len(ends), len(ends), "cpu"
        )
        found = tree_block_mask(ends, positions, None)
        assert found.shape == expected.shape
        for kind in ("", "full_"):
            assert torch.equal(blocks_of(found, kind), blocks_of(expected, kind))
            # The gradients of keys and values run over the transposed lists.
            name = f"{kind}q_num_blocks"
            assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("window", [20, 129, 400])
def test_with_a_window_no_visible_block_is_skipped_and_full_ones_are_full(window):
    for seed in range(5):
        tree = random_tree(seed, 700)
        mask = dense_mask(tree, window)
        missing = -len(mask) % BLOCK_SIZE
        padded = torch.nn.functional.pad(mask, (0, missing, 0, missing))
        blocks = padded.unflatten(1, (-1, BLOCK_SIZE)).unflatten(0, (-1, BLOCK_SIZE))  # (n, block, n, block)
        block_mask = tree_block_mask(tree["subtree_ends"], tree["position_ids"][0], window)
        partial, full = blocks_of(block_mask, ""), blocks_of(block_mask, "full_")
        assert torch.equal(full, blocks.all(3).all(1))
        assert not (blocks.any(3).any(1) & ~(partial | full)).any()
        assert not (partial & full).any()
        some = partial.sum() - (blocks.any(3).any(1) & ~full).sum()
        assert some <= 0.1 * blocks.shape[0] ** 2, "many empty blocks are computed"
        index = torch.arange(len(mask))
        assert torch.equal(block_mask.mask_mod(0, 0, index[:, None], index), mask)
