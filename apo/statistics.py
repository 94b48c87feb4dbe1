"""Confidence intervals and estimates."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % score interval (low, high) of a share that was observed in `count` independent trials."""
    assert 0 <= share <= 1 and count > 0, (share, count)
    spread = Z_95**2 / count
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def mean_and_interval(values: np.ndarray) -> dict[str, Any]:
    """Mean of (N,) values with its 95 % interval, mean +- 1.96 s / sqrt(N) with the sample deviation s.

    Returns:
        "mean", and "interval_95" as [low, high], or None for a single value.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "interval_95": None}
    half = Z_95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "interval_95": [mean - half, mean + half]}


def share_and_interval(hits: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Share of hits among all trials of P prompts, with a 95 % interval that takes only prompts as independent.

    Wilson's interval for as many independent trials as have the variance of the share over prompts, s (1 - s) / v (the
    effective sample size of Korn and Graubard, 1998), at most all; where all or none are hits, one trial a prompt.

    Args:
        hits, counts: (P,) of each prompt, 0 <= hits <= counts, counts above 0.

    Returns:
        "mean", and "interval_95" as [low, high].
    """
    num_prompts, total = len(counts), float(counts.sum())
    share = float(hits.sum()) / total
    effective, of_one = float(num_prompts), share * (1 - share)
    if num_prompts > 1 and of_one:
        residuals = hits - share * counts
        variance = num_prompts / (num_prompts - 1) * float(residuals @ residuals) / total**2
        effective = of_one / max(variance, of_one / total)
    return {"mean": share, "interval_95": list(wilson_interval(share, effective))}


@functools.cache
def best_of_weights(num_responses: int) -> np.ndarray:
    """Weights of the sorted rewards in the expected best of n responses.

    The i-th smallest of K rewards is the largest of C(i - 1, n - 1) of the C(K, n) subsets of n responses.

    Returns:
        (K, K): row n - 1, column i - 1 holds C(i - 1, n - 1) / C(K, n); a row sums to 1.
    """
    n = np.arange(1, num_responses + 1)[:, None]
    i = np.arange(num_responses, 1, -1)
    ratios = np.maximum(i - n, 0) / (i - 1)  # of the weight of i - 1 to that of i
    return (n / num_responses * np.cumprod(np.hstack([np.ones_like(n), ratios]), axis=1))[:, ::-1]


def expected_best(rewards: Iterable[float]) -> np.ndarray:
    """Estimates, from the K rewards of one prompt, the expected largest reward of n responses for n = 1 ... K.

    The mean of the largest over all subsets of n of the K responses, without replacement. It is unbiased for
    independent responses, unlike the largest of n draws from the K with replacement, which is too small: the argument
    behind pass@k in Chen et al., arXiv:2107.03374, section 2.1, with a maximum in place of "one of them passes".

    Returns:
        (K,): first the mean reward, last the largest.
    """
    ordered = np.sort(np.fromiter(rewards, dtype=float))
    return best_of_weights(len(ordered)) @ ordered
