"""Base class of budgets."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.tiers import TierLayout

#: Fractions are integers in this unit, so that every process counts alike.
UNIT = 10**9


def as_units(fraction: float) -> int:
    """A fraction in billionths."""
    return round(fraction * UNIT)


@dataclass(frozen=True)
class Budget(ABC):
    """``prompt tokens -> tokens kept per tier``, all integers.

    Counts never rise from one tier to the next. They are at least the sinks and the
    recent window, and at most the prompt. If the budget allows pruning and ``evict:
    chunk``, they also never fall as the prompt grows, and grow by at most one a token.
    """

    config: PolicyConfig
    layout: TierLayout

    @abstractmethod
    def cache_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens that each tier keeps of a prompt of ``num_tokens`` tokens."""

    def num_recent(self, num_tokens: int) -> int:
        """Length of the recent window of ``num_tokens`` tokens."""
        extra = as_units(self.config.recent_ratio) * num_tokens // UNIT
        return min(num_tokens, self.config.recent + extra)

    def always(self, num_tokens: int) -> int:
        """Sinks and recent window: the minimum that every layer keeps."""
        return min(num_tokens, self.config.sinks + self.num_recent(num_tokens))

    def by_tier(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The mean of each tier's layers, rounded down."""
        return tuple(
            sum(layers[layer] for layer in tier) // len(tier)
            for tier in self.layout.layers
        )
