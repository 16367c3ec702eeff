"""From what cutting each layer costs to how much each should keep."""

from collections.abc import Sequence

import numpy as np

_STEP = 0.01


def convex(ratios: Sequence[float], costs: Sequence[float]) -> np.ndarray:
    """A cost as a falling convex function of what is kept, on a grid of ``_STEP``.

    Args:
        ratios: shares kept, rising; keeping all is added, at no cost.
        costs: what each costs.

    Returns:
        ``[1 / _STEP + 1]``: the lower hull of the points from a share of 0 (where the
        line through the first two ends) to 1.
    """
    grid = np.linspace(0, 1, round(1 / _STEP) + 1)
    points = [*zip(ratios, np.maximum(costs, 0.0), strict=True), (1.0, 0.0)]
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    first = hull[0][1] - hull[0][0] * _slope(hull[0], hull[1])
    hull.insert(0, (0.0, first))
    shares, values = np.array(hull).T
    curve: np.ndarray = np.interp(grid, shares, values)
    return curve


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def layer_shares(
    ratios: Sequence[float],
    costs: np.ndarray,
    retention: float,
    least: float,
    falling: bool = False,
) -> list[float]:
    """Shares of mean ``retention`` that cost the least, if layers' costs add up.

    Shares grow step by step where a step saves most, which is optimal for convex
    costs.

    Args:
        ratios: shares kept for which costs are known, rising.
        costs: ``[num_ratios, num_layers]``, what it costs to keep that much there.
        retention: mean share kept.
        least: what every layer keeps.
        falling: whether deeper layers may not keep more.
    """
    curves = np.stack([convex(ratios, layer) for layer in costs.T])
    gains = -np.diff(curves, axis=1)
    taken = np.full(len(curves), round(least / _STEP))
    while taken.mean() * _STEP < retention:
        steps = np.minimum(taken, gains.shape[1] - 1)
        gain = gains[np.arange(len(curves)), steps]
        gain = np.where(taken < gains.shape[1], gain, -np.inf)
        # Of equal gains the least that is kept comes first, then the first layer.
        best = np.lexsort((taken, -gain))[0]
        taken[best] += 1
    shares = [float(share) for share in taken * _STEP]
    return not_rising(shares) if falling else shares


def not_rising(values: Sequence[float]) -> list[float]:
    """The nearest values, by squares, that do not rise: neighbours are pooled."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] < mean:
            other, size = blocks.pop()
            mean = (mean * count + other * size) / (count + size)
            count += size
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]
