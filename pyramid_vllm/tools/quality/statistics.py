"""Means with percentile bootstrap intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_NUM_RESAMPLES = 10_000
_LEVEL = 0.95
_Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and where it lies with 95% confidence."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], seed: int) -> Interval:
    """Mean of independent samples.

    Raises:
        ValueError: there are none.
    """
    return _bootstrap(np.array([values]), lambda means: means[0], seed)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], seed: int
) -> Interval:
    """Ratio of two means over the same samples, which are drawn together.

    Raises:
        ValueError: there are none, or not equally many.
    """
    if len(numerators) != len(denominators):
        raise ValueError(
            f"denominators are {len(denominators)}: valid is {len(numerators)}, one "
            "for each numerator"
        )
    columns = np.array([numerators, denominators])
    return _bootstrap(columns, lambda means: means[0] / means[1], seed)


def _bootstrap(
    columns: _Values, statistic: Callable[[_Values], _Values], seed: int
) -> Interval:
    """Percentiles of a statistic of column means, over resampled rows.

    Args:
        columns: ``[num_columns, num_samples]``.
        statistic: from ``[num_columns, ...]`` means to ``[...]``.
        seed: of the draws.
    """
    num_samples = columns.shape[1]
    if num_samples == 0:
        raise ValueError("samples are 0: valid is 1 or more")
    draws = np.random.default_rng(seed).integers(
        num_samples, size=(_NUM_RESAMPLES, num_samples)
    )
    resampled = statistic(columns[:, draws].mean(axis=-1))
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(float(statistic(columns.mean(axis=-1))), float(low), float(high))
