"""Computes each layer's share from the cost of cutting that layer."""

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
    points, values = np.array([*ratios, 1.0]), np.array([*costs, 0.0]).clip(min=0)
    widths = np.diff(points)
    # The lower hull's slopes are the points' slopes, pooled where they would fall.
    falls = np.array(not_rising(-np.diff(values) / widths, widths))
    # Summed from the right end, where the cost is 0.
    heights = [*np.cumsum((falls * widths)[::-1])[::-1], 0.0]
    grid = np.linspace(0, 1, round(1 / _STEP) + 1)
    first = heights[0] + falls[0] * points[0]
    curve: np.ndarray = np.interp(grid, [0.0, *points], [first, *heights])
    return curve


def layer_shares(
    ratios: Sequence[float],
    costs: np.ndarray,
    retention: float,
    least: float,
    tiers: Sequence[Sequence[int]] | None = None,
) -> list[float]:
    """Shares of mean ``retention``, or just below, that cost least if costs add up.

    Shares grow step by step where a step saves most, which is optimal for convex
    costs.

    Args:
        ratios: shares kept for which costs are known, rising.
        costs: ``[num_ratios, num_layers]``, what it costs to keep that much there.
        retention: mean share kept.
        least: what every layer keeps.
        tiers: layers that keep equally much; none: each its own share.
    """
    num_layers = costs.shape[1]
    tiers = tiers or [(layer,) for layer in range(num_layers)]
    sizes = np.array([len(tier) for tier in tiers])
    curves = np.stack([convex(ratios, layer) for layer in costs.T])
    gains = np.stack([-np.diff(curves[list(tier)].mean(axis=0)) for tier in tiers])
    taken = np.full(len(tiers), round(least / _STEP))
    left = round(retention / _STEP * num_layers) - int(taken @ sizes)
    while True:
        fits = (sizes <= left) & (taken < gains.shape[1])
        if not fits.any():
            break
        steps = np.minimum(taken, gains.shape[1] - 1)
        gain = np.where(fits, gains[np.arange(len(tiers)), steps], -np.inf)
        # Of equal gains the tier that keeps least comes first, then the first tier.
        best = np.lexsort((taken, -gain))[0]
        taken[best] += 1
        left -= int(sizes[best])
    shares = np.zeros(num_layers)
    for tier, count in zip(tiers, taken, strict=True):
        shares[list(tier)] = count * _STEP
    return [float(share) for share in shares]


def not_rising(
    values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray = ()
) -> list[float]:
    """The nearest values, by weighted squares, that do not rise: neighbours are
    pooled."""
    blocks: list[tuple[float, float, int]] = []
    for index, value in enumerate(values):
        mean, weight, count = value, weights[index] if len(weights) else 1.0, 1
        while blocks and blocks[-1][0] < mean:
            other, size, length = blocks.pop()
            mean = (mean * weight + other * size) / (weight + size)
            weight, count = weight + size, count + length
        blocks.append((mean, weight, count))
    return [float(mean) for mean, _, count in blocks for _ in range(count)]
