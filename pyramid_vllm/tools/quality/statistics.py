"""Means with percentile bootstrap intervals."""

from collections.abc import Sequence

import numpy as np

_NUM_RESAMPLES = 10_000
#: A figure, ``value``, and where it lies with 95% confidence, from ``low`` to ``high``.
Interval = dict[str, float]


def mean_interval(values: Sequence[float], seed: int) -> Interval:
    """Mean of independent samples."""
    return ratio_interval(values, [1.0] * len(values), seed)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], seed: int
) -> Interval:
    """Ratio of two means over the same samples, which are drawn together."""
    above, below = np.array(numerators), np.array(denominators)
    size = (_NUM_RESAMPLES, len(above))
    draws = np.random.default_rng(seed).integers(len(above), size=size)
    resampled = above[draws].mean(axis=1) / below[draws].mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    value = float(above.mean() / below.mean())
    return {"value": value, "low": float(low), "high": float(high)}
