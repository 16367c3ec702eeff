"""How many tokens each layer keeps, from the published formulas."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any


class LayerCounts:
    """Counts by layer for one policy and model.

    Args:
        config: the policy's settings.
        num_layers: layers of the model.
        sizes: layers of each tier; None: as equal as can be.
    """

    def __init__(
        self, config: Any, num_layers: int, sizes: Sequence[int] | None = None
    ) -> None:
        self.config = config
        self.num_layers = num_layers
        if sizes is None:
            tiers = num_layers if config.tiers == "layers" else config.tiers
            assert isinstance(tiers, int), "the oracle needs a number of tiers"
            size, longer = divmod(num_layers, tiers)
            sizes = [size + (tier < longer) for tier in range(tiers)]
        by_rank = [tier for tier, size in enumerate(sizes) for _ in range(size)]
        self.tier = [by_rank[rank] for rank in self._ranks()]

    def _ranks(self) -> list[int]:
        """Place of each layer among all, heaviest first; without weights, by depth."""
        weights = self.config.layer_weights
        if weights is None or self.config.prune_from is not None:
            return list(range(self.num_layers))
        assert weights != "auto", "the oracle needs the model's weights"
        pairs = list(enumerate(weights))
        return [
            sum(b > a or (b == a and j < i) for j, b in pairs)
            for i, a in enumerate(weights)
        ]

    def recent(self, n: int) -> int:
        """Newest tokens that always stay."""
        ratio = Fraction(str(self.config.recent_ratio))
        return min(n, self.config.recent + math.floor(ratio * n))

    def prompt(self, n: int) -> list[int]:
        """Tokens of a prompt that each layer keeps."""
        by_layer = {
            "retention": self._retention,
            "pyramidinfer": self._pyramidinfer,
            "arithmetic": self._arithmetic,
        }[self.config.budget](n)
        return self._by_tier(by_layer)

    def _by_tier(self, values: list[Any]) -> list[int]:
        means = {}
        for tier in set(self.tier):
            members = [v for v, t in zip(values, self.tier, strict=True) if t == tier]
            means[tier] = math.floor(sum(members) / Fraction(len(members)))
        return [means[tier] for tier in self.tier]

    def _fall(self, shape: str, depth: float) -> float:
        return (math.cos(math.pi * depth) + 1) / 2 if shape == "cosine" else 1 - depth

    def _retention(self, n: int) -> list[Any]:
        """The line through (onset, retention * onset) with each layer's own slope."""
        config = self.config
        retention = Fraction(str(config.retention))
        ratio = Fraction(str(config.recent_ratio))
        onset = max(
            math.ceil(Fraction(config.sinks + config.recent) / (retention - ratio)),
            math.ceil(config.min_context / retention),
        )
        floor = min(n, max(config.sinks + self.recent(n), config.min_context))
        if config.layer_weights is not None:
            exact = self._slopes_by_weight(retention, ratio)
            means = [
                Fraction(
                    sum(s for s, t in zip(exact, self.tier, strict=True) if t == tier)
                )
                / self.tier.count(tier)
                for tier in self.tier
            ]
            # Rounded up, in billionths.
            slopes = [Fraction(math.ceil(mean * 10**9), 10**9) for mean in means]
            return [max(floor, n * slope) for slope in slopes]
        # The slope of a tier is rounded down once, in billionths.
        if n < onset:
            return [floor] * self.num_layers
        by_tier = self._by_tier(self._slopes_by_depth(float(retention), float(ratio)))
        return [
            min(n, retention * onset + (n - onset) * Fraction(slope, 10**9))
            for slope in by_tier
        ]

    def _slopes_by_depth(self, retention: float, ratio: float) -> list[int]:
        config = self.config
        spread = config.steepness * min(retention - ratio, 1 - retention)
        falls = [
            2 * self._fall(config.shape, (i + 0.5) / self.num_layers) - 1
            for i in range(self.num_layers)
        ]
        return [round(1e9 * (retention + spread * fall)) for fall in falls]

    def _slopes_by_weight(self, retention: Fraction, ratio: Fraction) -> list[Fraction]:
        """Weights times the one scale at which slopes, cut to ``ratio`` and 1, have
        the mean ``retention``: the sum is a line between the scales that cut."""
        weights = [Fraction(weight) for weight in self.config.layer_weights]
        total = retention * self.num_layers

        def slopes(scale: Fraction) -> list[Fraction]:
            return [min(Fraction(1), max(ratio, scale * w)) for w in weights]

        corners = sorted(
            {Fraction(0), *(end / w for w in weights for end in (ratio, 1))}
        )
        high = next(corner for corner in corners if sum(slopes(corner)) >= total)
        low = max((corner for corner in corners if corner < high), default=high)
        below, above = sum(slopes(low)), sum(slopes(high))
        share = (total - below) / (above - below) if above > below else 0
        return slopes(low + share * (high - low))

    def _pyramidinfer(self, n: int) -> list[Any]:
        config = self.config
        d = config.prefill_decay_ratio
        recent = self.recent(n)
        context = n - recent
        least = min(context, max(config.min_context, config.sinks))
        kept = []
        for i in range(self.num_layers):
            kept.append(recent + context)
            if i % config.layerwise_downsample_interval == 0:
                r = (1 - d) * self._fall(config.shape, i / self.num_layers) + d
                context = max(least, math.floor(context * r + 1e-9))
        return kept

    def _arithmetic(self, n: int) -> list[Any]:
        config = self.config
        mean = config.capacity or math.floor(Fraction(str(config.retention)) * n)
        recent = self.recent(n)
        mean = max(mean, config.min_context, min(n, recent + config.sinks))
        if n <= mean:
            return [n] * self.num_layers
        low = (mean - recent) // config.beta
        high = 2 * (mean - recent) - low
        if high > n - recent:
            high, low = n - recent, 2 * (mean - recent) - (n - recent)
        steps = max(1, self.num_layers - 1)
        return [
            recent + max(config.sinks, high - i * (high - low) // steps)
            for i in range(self.num_layers)
        ]

    def segment(self) -> list[int]:
        """Tokens that each layer keeps of a segment: its share in whole pages, halves
        rounded up."""
        c, many = self.config, 10**6
        pages = Fraction(c.segment, c.page)
        return [
            c.page * max(1, math.floor(pages * Fraction(kept, many) + Fraction(1, 2)))
            for kept in self.prompt(many)
        ]

    def pruned_layers(self) -> set[int]:
        """Layers whose input is pruned."""
        start = self.config.prune_from
        if start is None:
            return set()
        firsts = [self.tier.index(tier) for tier in sorted(set(self.tier))]
        pruned = [first for first in firsts if first >= max(1, start)]
        return set(range(min(pruned), self.num_layers)) if pruned else set()

    def rows(self, before: int, after: int) -> list[int]:
        """Rows of a chunk that each layer computes."""
        recent = min(after - before, self.recent(after))
        grown = [
            b - a for a, b in zip(self.prompt(before), self.prompt(after), strict=True)
        ]
        pruned = self.pruned_layers()
        return [
            max(recent, *grown[i:]) if i in pruned else after - before
            for i in range(self.num_layers)
        ]

    def groups(self, n: int, generated: int) -> int:
        """Compressions of generated tokens so far: each comes when enough tokens have
        left the recent window."""
        length = self.config.exceed_length_to_compress
        if length is None:
            return 0
        outside = generated - self.recent(n + generated)
        return outside // length if outside > 0 else 0

    def group_kept(self) -> list[int]:
        """Tokens that each layer keeps of the generated tokens that are compressed at
        once."""
        c = self.config
        ratios = [
            (1 - c.gen_decay_ratio)
            * self._fall(c.gen_decay_strategy, i / self.num_layers)
            + c.gen_decay_ratio
            for i in range(self.num_layers)
        ]
        whole = c.exceed_length_to_compress * c.gen_compress_ratio
        return self._by_tier([max(1, int(whole * ratio + 1e-9)) for ratio in ratios])
