"""Cache lengths: how many tokens each tier keeps, as a function of length alone."""

import math
from dataclasses import dataclass
from functools import cached_property

from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.tiers import TierLayout

#: Fractions are integers in this unit, so that every process counts alike.
_UNIT = 10**9


def _profile(shape: str, layer: int, num_layers: int) -> float:
    """Fall from almost 1 in the first layer to almost -1 in the last, mean 0."""
    depth = (layer + 0.5) / num_layers
    return math.cos(math.pi * depth) if shape == "cosine" else 1 - 2 * depth


@dataclass(frozen=True)
class LengthRule:
    """The integer rule ``prompt tokens -> tokens kept per tier``.

    Up to the length ``onset`` every tier keeps the floor: the sinks and the recent
    window, or ``min_context``. Past it a tier grows by a constant fraction of a token
    for each token of the prompt, a smaller one in deeper tiers; the fractions' mean
    over layers is ``retention``. So counts never fall with length, never grow by more
    than one a token, and their mean over layers is ``retention`` times the length.
    """

    config: PolicyConfig
    layout: TierLayout

    @cached_property
    def _retention(self) -> int:
        return round(self.config.retention * _UNIT)

    @cached_property
    def _recent_ratio(self) -> int:
        return round(self.config.recent_ratio * _UNIT)

    @cached_property
    def growth(self) -> tuple[int, ...]:
        """Tokens that each tier keeps of a billion prompt tokens past the onset."""
        config, num_layers = self.config, self.layout.num_layers
        retention, floor_growth = self._retention, self._recent_ratio
        # No layer grows faster than the prompt, or slower than its recent window.
        spread = config.steepness * min(retention - floor_growth, _UNIT - retention)
        layers = [
            retention + round(spread * _profile(config.shape, layer, num_layers))
            for layer in range(num_layers)
        ]
        growth, start = [], 0
        for size in self.layout.sizes:
            growth.append(sum(layers[start : start + size]) // size)
            start += size
        return tuple(growth)

    @cached_property
    def onset(self) -> int:
        """Prompt length, in tokens, from which the mean retention is met."""
        fixed = (self.config.sinks + self.config.recent) * _UNIT
        by_window = -(-fixed // (self._retention - self._recent_ratio))
        by_context = -(-self.config.min_context * _UNIT // self._retention)
        return max(by_window, by_context)

    def num_recent(self, num_tokens: int) -> int:
        """Length of the recent window of a prompt of ``num_tokens`` tokens."""
        extra = self._recent_ratio * num_tokens // _UNIT
        return min(num_tokens, self.config.recent + extra)

    def floor(self, num_tokens: int) -> int:
        """Tokens that every tier keeps of a prompt of ``num_tokens`` tokens."""
        window = self.config.sinks + self.num_recent(num_tokens)
        return min(num_tokens, max(window, self.config.min_context))

    def cache_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens of a prompt of ``num_tokens`` tokens that each tier keeps."""
        past = num_tokens - self.onset
        if past < 0:
            return (self.floor(num_tokens),) * self.layout.num_tiers
        base = self._retention * self.onset
        return tuple(
            min(num_tokens, (base + past * growth) // _UNIT) for growth in self.growth
        )

    def held_lengths(
        self, num_prompt_tokens: int, num_computed_tokens: int
    ) -> tuple[int, ...]:
        """Tokens each tier holds once the step that computed the last of
        ``num_computed_tokens`` is over. Generated tokens are all kept."""
        prompt = min(num_computed_tokens, num_prompt_tokens)
        if prompt < num_prompt_tokens and self.config.evict == "prompt_end":
            kept: tuple[int, ...] = (prompt,) * self.layout.num_tiers
        else:
            kept = self.cache_lengths(prompt)
        generated = num_computed_tokens - prompt
        return tuple(length + generated for length in kept)

    def peak_lengths(
        self, num_prompt_tokens: int, num_tokens: int, max_chunk: int
    ) -> tuple[int, ...]:
        """Most tokens each tier holds on the way to ``num_tokens`` computed ones.

        Args:
            num_prompt_tokens: length of the prompt.
            num_tokens: prompt and generated tokens, at the end of the way.
            max_chunk: most prompt tokens that one step computes.
        """
        prompt = min(num_tokens, num_prompt_tokens)
        if self.config.evict == "prompt_end":
            prefill: tuple[int, ...] = (prompt,) * self.layout.num_tiers
        else:
            # Counts grow by at most one a token, so the last chunk is the worst.
            chunk = min(prompt, max_chunk)
            before = self.cache_lengths(prompt - chunk)
            prefill = tuple(length + chunk for length in before)
        end = self.held_lengths(num_prompt_tokens, num_tokens)
        return tuple(map(max, prefill, end))
