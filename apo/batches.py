"""How many tokens a record has, and the division of a data set into batches of so many tokens."""

from __future__ import annotations

import itertools
import operator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


def count_tokens(sequences: list[list[int]]) -> dict[str, int]:
    """Counts the tokens of a record: `length` as a prefix tree, `num_tokens` in all, `longest` of a sequence.

    In sorted order, the longest prefix that a sequence shares with an earlier one is shared with its neighbour.
    """
    shared = [
        next(itertools.compress(itertools.count(), map(operator.ne, first, second)), min(len(first), len(second)))
        for first, second in itertools.pairwise(sorted(sequences))
    ]
    lengths = [len(sequence) for sequence in sequences]
    return {"length": sum(lengths) - sum(shared), "num_tokens": sum(lengths), "longest": max(lengths)}


def batch_by_tokens(dataset: datasets.Dataset, token_budget: int, batching: str) -> list[list[int]]:
    """Divides a data set into batches of at most `token_budget` tokens, padding included.

    Padded batches take the longest items first, so that an item meets others of its length, and memory runs out at
    once or never. Trees have no padding to avoid; they keep the order of the file, in which pairs of the same prompt
    are mostly neighbours and share its tokens.

    Returns:
        Indices of the items of each batch; an item above the budget is a batch by itself.
    """
    if batching == "tree":
        order, counts, widths = range(len(dataset)), dataset["length"][:], [1] * len(dataset)
    else:
        counts, widths = [len(scores) for scores in dataset["scores"][:]], dataset["longest"][:]
        order = sorted(range(len(dataset)), key=lambda i: -widths[i])
    batches: list[list[int]] = []
    count = 0  # of tokens in a tree, of rows as wide as the first one where they are padded
    for i in order:
        count += counts[i]
        if not batches or count * widths[batches[-1][0]] > token_budget:
            batches.append([])
            count = counts[i]
        batches[-1].append(i)
    return batches
