"""Tokens of a record, and batches of a token budget."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from apo.batches import batch_by_tokens, count_tokens
from reward_datasets import RewardDataCollator


@given(st.lists(st.lists(st.integers(0, 2), max_size=6).map(lambda ids: [1, *ids]), min_size=1, max_size=5))
def test_length_counts_shared_prefixes_once(sequences):
    """A prefix tree has one token for each different prefix of its sequences."""
    prefixes = {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}
    lengths = [len(ids) for ids in sequences]
    expected = {"length": len(prefixes), "num_tokens": sum(lengths), "longest": max(lengths)}
    assert count_tokens(sequences) == expected


@pytest.mark.parametrize("batching", ["tree", "padded"])
@given(
    st.lists(st.lists(st.lists(st.integers(5, 7), min_size=1, max_size=9), min_size=1, max_size=4), min_size=1),
    st.integers(1, 60),
)
@settings(deadline=None, max_examples=50)
def test_batches_hold_each_item_once_and_keep_to_the_budget(batching, items, budget):
    """What runs is counted on the collated batch; a single item may be larger."""
    rows = [{"input_ids": item, "scores": [0.5] * len(item), "is_apo": False, **count_tokens(item)} for item in items]
    batches = batch_by_tokens(Dataset.from_list(rows), budget, batching)
    assert sorted(i for batch in batches for i in batch) == list(range(len(items)))
    collate = RewardDataCollator(pad_token_id=3, batching=batching)
    for batch in batches:
        assert collate([rows[i] for i in batch])["input_ids"].numel() <= budget or len(batch) == 1
    if batching == "tree":
        assert [i for batch in batches for i in batch] == list(range(len(items)))


def test_padded_batches_take_the_longest_items_first():
    lengths = [3, 9, 1, 9, 5]
    rows = [{"input_ids": [[5] * n], "scores": [0.5], **count_tokens([[5] * n])} for n in lengths]
    assert batch_by_tokens(Dataset.from_list(rows), 18, "padded") == [[1, 3], [4, 0, 2]]
