"""One knob: the mean fraction of the prompt that layers keep."""

import math
from dataclasses import dataclass
from functools import cached_property

from pyramid_vllm.policy.budgets.base import UNIT, Budget, as_units


def _profile(shape: str, layer: int, num_layers: int) -> float:
    """Fall from almost 1 in the first layer to almost -1 in the last, mean 0."""
    depth = (layer + 0.5) / num_layers
    return math.cos(math.pi * depth) if shape == "cosine" else 1 - 2 * depth


@dataclass(frozen=True)
class RetentionBudget(Budget):
    """Constant fractions whose mean over layers is ``retention``.

    Up to the length ``onset`` every tier keeps the floor: the sinks and the recent
    window, or ``min_context``. Past it a tier grows by a constant fraction of a token
    for each token of the prompt, a smaller one in deeper tiers.
    """

    @cached_property
    def growth(self) -> tuple[int, ...]:
        """Tokens that each tier keeps of a billion prompt tokens past the onset."""
        config, num_layers = self.config, self.layout.num_layers
        retention = as_units(config.retention)
        floor_growth = as_units(config.recent_ratio)
        # No layer grows faster than the prompt, or slower than its recent window.
        spread = config.steepness * min(retention - floor_growth, UNIT - retention)
        return self.by_tier(
            [
                retention + round(spread * _profile(config.shape, layer, num_layers))
                for layer in range(num_layers)
            ]
        )

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
        past = num_tokens - self.onset
        if past < 0:
            return (self.floor(num_tokens),) * self.layout.num_tiers
        base = as_units(self.config.retention) * self.onset
        return tuple(
            min(num_tokens, (base + past * growth) // UNIT) for growth in self.growth
        )
