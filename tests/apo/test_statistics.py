"""Confidence intervals, by hand."""

import pytest

from apo.statistics import wilson_interval


def test_wilson_interval_by_hand():
    """8 of 10, z = 1.96: z^2/n = 0.38415; center (0.8 + 0.19207) / 1.38415 = 0.71674; half
    sqrt(0.38415 * (0.16 + 0.09604)) / 1.38415 = 0.31362 / 1.38415 = 0.22658; so 0.4902 to 0.9433."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)


@pytest.mark.parametrize("count", [1, 20, 4664])
def test_interval_is_within_0_and_1_and_symmetric(count):
    low, high = wilson_interval(0.0, count)
    assert low == 0.0 and 0 < high < 1
    assert wilson_interval(1.0, count) == pytest.approx((1 - high, 1.0))
