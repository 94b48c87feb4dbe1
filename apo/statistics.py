"""Confidence intervals and estimates."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share, observed in `count` independent trials.

    Returns:
        (low, high) within [0, 1].
    """
    assert 0 <= share <= 1 and count > 0, (share, count)
    spread = Z_95**2 / count
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)
