"""Confidence intervals, by hand."""

import numpy as np
import pytest

from apo.statistics import share_and_interval, wilson_interval


def test_wilson_interval_by_hand():
    """8 of 10, z = 1.96: z^2/n = 0.38415; center (0.8 + 0.19207) / 1.38415 = 0.71674; half
    sqrt(0.38415 * (0.16 + 0.09604)) / 1.38415 = 0.31362 / 1.38415 = 0.22658; so 0.4902 to 0.9433."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)


@pytest.mark.parametrize("count", [1, 20, 4664])
def test_interval_is_within_0_and_1_and_symmetric(count):
    low, high = wilson_interval(0.0, count)
    assert low == 0.0 and 0 < high < 1
    assert wilson_interval(1.0, count) == pytest.approx((1 - high, 1.0))


def test_pairs_of_one_prompt_are_not_independent_by_hand():
    """2 of 2, 2 of 2, 0 of 2: s = 2/3; residuals 2/3, 2/3, -4/3, squares 24/9; v = 3/2 * 24/9 / 36 = 1/9; so
    s (1 - s) / v = 2 independent pairs, and not 6."""
    result = share_and_interval(np.array([2, 2, 0]), np.array([2, 2, 2]))
    assert result["mean"] == pytest.approx(2 / 3)
    assert result["interval_95"] == pytest.approx(wilson_interval(2 / 3, 2))


@pytest.mark.parametrize(
    ("hits", "counts", "effective"),
    [
        ([1, 1, 0, 1], [1, 1, 1, 1], 3),  # v has n - 1
        ([1, 1, 1], [2, 2, 2], 6),  # no variance between prompts: all pairs
        ([2, 4], [2, 4], 2),  # all hits: the prompts
        ([1], [3], 1),  # one prompt
    ],
)
def test_effective_number_of_pairs(hits, counts, effective):
    share = sum(hits) / sum(counts)
    result = share_and_interval(np.array(hits), np.array(counts))
    assert result == {"mean": share, "interval_95": pytest.approx(list(wilson_interval(share, effective)))}
