"""PyramidInfer's budget: the context decays from layer to layer, compounding."""

import math
from dataclasses import dataclass
from functools import cached_property

from pyramid_vllm.policy.budgets.base import UNIT, Budget, as_units
from pyramid_vllm.policy.errors import KVPolicyError

_BISECTIONS = 50


def _fall(shape: str, layer: int, num_layers: int) -> float:
    """Fall from 1 in the first layer towards 0 after the last."""
    depth = layer / num_layers
    return (math.cos(math.pi * depth) + 1) / 2 if shape == "cosine" else 1 - depth


def decay(shape: str, ratio: float, layer: int, num_layers: int) -> float:
    """Fall from 1 in the first layer towards ``ratio`` after the last."""
    return (1 - ratio) * _fall(shape, layer, num_layers) + ratio


@dataclass(frozen=True)
class PyramidInferBudget(Budget):
    """The context before the recent window shrinks from layer to layer.

    PyramidInfer (arXiv 2405.12532, section 4, and its released code): layer ``i``,
    where ``i`` is a multiple of ``layerwise_downsample_interval``, passes
    ``r(i) = (1 - d) * (cos(pi * i / L) + 1) / 2 + d`` of its context to layer
    ``i + 1``, where ``d`` is ``prefill_decay_ratio`` and ``L`` the number of layers.
    The context includes the sinks and never falls below ``min_context``. (The
    released code skips a decay that would end below that. This class stops at
    ``min_context`` instead, so that counts never fall as a prompt grows.)
    """

    @cached_property
    def decay_ratio(self) -> float:
        """``prefill_decay_ratio``, or the one that meets ``retention``.

        Raises:
            KVPolicyError: the steepest decay keeps more than ``retention``.
        """
        config = self.config
        if config.prefill_decay_ratio is not None:
            return config.prefill_decay_ratio
        recent = config.recent_ratio
        target = (config.retention - recent) / (1 - recent)
        low, high = 0.0, 1.0
        if self._mean_context(low) > target:
            least = recent + (1 - recent) * self._mean_context(low)
            raise KVPolicyError(
                f"KV policy '{config.name}': setting 'retention' is "
                f"{config.retention:g}: valid with budget 'pyramidinfer', "
                f"{self.layout.num_layers} layers and "
                f"layerwise_downsample_interval={config.layerwise_downsample_interval} "
                f"is {least:.3f} to 1"
            )
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self._mean_context(middle) > target:
                high = middle
            else:
                low = middle
        return high

    @cached_property
    def _falls(self) -> list[float | None]:
        """The fall at each layer; None: the layer passes its whole context on."""
        num_layers = self.layout.num_layers
        interval = self.config.layerwise_downsample_interval
        return [
            _fall(self.config.shape, layer, num_layers)
            if layer % interval == 0
            else None
            for layer in range(num_layers)
        ]

    def _decays(self, ratio: float) -> list[float]:
        """Fraction of its context that each layer passes to the next."""
        rest = 1 - ratio
        return [1.0 if fall is None else rest * fall + ratio for fall in self._falls]

    def _mean_context(self, ratio: float) -> float:
        """Mean fraction of the context that layers compute."""
        total, left = 0.0, 1.0
        for handed_on in self._decays(ratio):
            total += left
            left *= handed_on
        return total / self.layout.num_layers

    @cached_property
    def _handed_on(self) -> tuple[int, ...]:
        return tuple(as_units(value) for value in self._decays(self.decay_ratio))

    def cache_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """See ``Budget``."""
        recent = self.num_recent(num_tokens)
        context = num_tokens - recent
        least = min(context, max(self.config.min_context, self.config.sinks))
        layers = []
        for handed_on in self._handed_on:
            layers.append(recent + context)
            # `as_units` may lose half a billionth; a whole context must not shrink.
            context = max(least, context * (handed_on + 1) // UNIT)
        return self.by_tier(layers)
