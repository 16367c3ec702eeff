"""One knob: the mean fraction of the prompt that layers keep."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property, lru_cache

from pyramid_vllm.policy.budgets.base import UNIT, Budget, as_units
from pyramid_vllm.policy.errors import KVPolicyError


def _profile(shape: str, layer: int, num_layers: int) -> float:
    """Fall from almost 1 in the first layer to almost -1 in the last, mean 0."""
    depth = (layer + 0.5) / num_layers
    return math.cos(math.pi * depth) if shape == "cosine" else 1 - 2 * depth


def growths(weights: tuple[float, ...], least: float, scale: float) -> list[float]:
    """Each layer's growth by its weight, from ``least`` to 1 token for each token."""
    return [min(1.0, max(least, scale * weight)) for weight in weights]


@lru_cache(maxsize=16)
def _totals(
    weights: tuple[float, ...], least: float
) -> tuple[list[float], list[float]]:
    """Scales at which a layer's growth reaches a bound, ascending, and the sum of all
    growths at each: between two of them it is linear. Requests with retentions of their
    own differ in the sum alone."""
    scales = sorted({bound / weight for weight in weights for bound in (least, 1.0)})
    return scales, [sum(growths(weights, least, scale)) for scale in scales]


@dataclass(frozen=True)
class RetentionBudget(Budget):
    """Constant fractions whose mean over layers is ``retention``.

    Up to the length ``onset`` every tier keeps the floor: the sinks and the recent
    window, or ``min_context``. Beyond it a tier grows by a constant fraction of a
    token for each token of the prompt; the fraction is smaller in later tiers.

    With ``layer_weights`` a tier keeps its fraction of the whole prompt, at least the
    floor, so that a layer can keep every token. If the floor is larger, the mean is
    above ``retention``.
    """

    @cached_property
    def growth(self) -> tuple[int, ...]:
        """Tokens that each tier keeps of a billion prompt tokens after the onset."""
        config, num_layers = self.config, self.layout.num_layers
        retention = as_units(config.retention)
        floor_growth = as_units(config.recent_ratio)
        if config.given_weights is not None:
            layers = self._weighted(config.given_weights)
            means = [
                sum(layers[layer] for layer in tier) / len(tier)
                for tier in self.layout.layers
            ]
            # Rounded up: rounding down twice could miss the mean by more than a token.
            growth = tuple(min(UNIT, math.ceil(mean * UNIT)) for mean in means)
            return self._not_rising(growth)
        # No layer grows faster than the prompt, or slower than its recent window.
        spread = config.steepness * min(retention - floor_growth, UNIT - retention)
        return self.by_tier(
            [
                retention + round(spread * _profile(config.shape, layer, num_layers))
                for layer in range(num_layers)
            ]
        )

    def _weighted(self, weights: tuple[float, ...]) -> list[float]:
        """Growth of each layer by its weight, with mean ``retention``. No layer grows
        faster than the prompt or slower than its recent window."""
        least, wanted = self.config.recent_ratio, self.config.retention * len(weights)
        scales, totals = _totals(weights, least)
        place = min(len(scales) - 1, max(1, bisect_left(totals, wanted)))
        low, high = scales[place - 1 : place + 1]
        below, above = totals[place - 1 : place + 1]
        share = (wanted - below) / (above - below) if above > below else 1.0
        return growths(weights, least, low + (high - low) * share)

    def _not_rising(self, growth: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``growth`` if pruning allows it: deeper tiers lack pruned rows.

        Raises:
            KVPolicyError: a pruned tier would keep more than the one before it.
        """
        config, start = self.config, 0
        if config.prune_from is None:
            return growth
        for before, after, size in zip(
            growth, growth[1:], self.layout.sizes, strict=False
        ):
            start += size
            if after > before and start >= config.prune_from:
                raise KVPolicyError(
                    f"KV policy '{config.name}': setting 'layer_weights' rises at "
                    f"layer {start}: valid with prune_from={config.prune_from} are "
                    "weights that do not rise from there on"
                )
        return growth

    @cached_property
    def onset(self) -> int:
        """Prompt length, in tokens, from which the mean retention is met."""
        config = self.config
        retention = as_units(config.retention)
        fixed = (config.sinks + config.recent) * UNIT
        by_window = -(-fixed // (retention - as_units(config.recent_ratio)))
        by_context = -(-config.min_context * UNIT // retention)
        return max(by_window, by_context)

    def floor(self, num_tokens: int) -> int:
        """Tokens that every tier keeps of a prompt of ``num_tokens`` tokens."""
        return min(num_tokens, max(self.always(num_tokens), self.config.min_context))

    def cache_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """See ``Budget``."""
        if self.config.given_weights is not None:
            floor = self.floor(num_tokens)
            return tuple(
                max(floor, num_tokens * growth // UNIT) for growth in self.growth
            )
        past = num_tokens - self.onset
        if past < 0:
            return (self.floor(num_tokens),) * self.layout.num_tiers
        base = as_units(self.config.retention) * self.onset
        return tuple(
            min(num_tokens, (base + past * growth) // UNIT) for growth in self.growth
        )
