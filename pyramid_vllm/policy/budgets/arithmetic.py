"""Budgets that fall by the same number from layer to layer, at a fixed total."""

from dataclasses import dataclass

from pyramid_vllm.policy.budgets.base import UNIT, Budget, as_units


@dataclass(frozen=True)
class ArithmeticBudget(Budget):
    """PyramidKV's budgets (arXiv 2406.02069).

    ``k`` is the mean number of tokens kept before the recent window. The last of
    ``L`` layers keeps ``k / beta``, the first ``2k - k / beta``; layers between are
    interpolated linearly. If the first would keep more tokens than exist, it keeps
    all, and the last layer gets the rest of the total. ``beta=1`` gives every layer
    the same budget: SnapKV (arXiv 2404.14469).
    """

    def cache_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """See ``Budget``. Deep tiers may get less as ``num_tokens`` grows."""
        config, num_layers = self.config, self.layout.num_layers
        mean = config.capacity
        if mean is None:
            mean = as_units(config.retention) * num_tokens // UNIT
        mean = max(mean, config.min_context, self.always(num_tokens))
        if num_tokens <= mean:
            return (num_tokens,) * self.layout.num_tiers
        recent = self.num_recent(num_tokens)
        context = mean - recent
        last = context // config.beta
        first = 2 * context - last
        if first > num_tokens - recent:
            first = num_tokens - recent
            last = 2 * context - first
        steps = max(1, num_layers - 1)
        layers = [
            recent + max(config.sinks, first - layer * (first - last) // steps)
            for layer in range(num_layers)
        ]
        return self.by_tier(layers)
