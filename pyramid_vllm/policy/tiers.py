"""Tiers: full-attention layers that share one count, grouped by depth or by weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class TierLayout:
    """``num_layers`` full-attention layers cut into ``num_tiers`` runs, first to last.

    Unless ``given_sizes`` says otherwise, the runs are equally long; if the layers do
    not divide evenly, the first ones have one layer more.
    """

    num_layers: int
    num_tiers: int
    order: tuple[int, ...] | None = None
    """Layers in the order in which they are cut into tiers; None: by depth."""
    given_sizes: tuple[int, ...] | None = None
    """Number of layers of each tier, where they are not equal."""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of layers of each tier."""
        if self.given_sizes is not None:
            return self.given_sizes
        size, longer = divmod(self.num_layers, self.num_tiers)
        return tuple(size + (tier < longer) for tier in range(self.num_tiers))

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """Each tier's layers, by depth."""
        order = self.order or tuple(range(self.num_layers))
        tiers, start = [], 0
        for size in self.sizes:
            tiers.append(tuple(sorted(order[start : start + size])))
            start += size
        return tuple(tiers)

    @cached_property
    def tier_of_layer(self) -> tuple[int, ...]:
        """Tier of each layer."""
        tiers = {
            layer: tier for tier, layers in enumerate(self.layers) for layer in layers
        }
        return tuple(tiers[layer] for layer in range(self.num_layers))

    def mean(self, counts: Sequence[int]) -> float:
        """Mean over layers of a count per tier."""
        return sum(map(int.__mul__, counts, self.sizes)) / self.num_layers

    @property
    def group_size(self) -> int:
        """Layers of a KV cache group: vLLM gives all groups the same number."""
        smallest, largest = min(self.sizes), max(self.sizes)
        return largest if largest < 1.5 * smallest else smallest

    @property
    def groups_per_tier(self) -> tuple[int, ...]:
        """Number of KV cache groups that vLLM makes of each tier."""
        return tuple(-(-size // self.group_size) for size in self.sizes)

    @property
    def num_padding_layers(self) -> int:
        """Memory that padding to equal groups wastes, in layers."""
        return self.group_size * sum(self.groups_per_tier) - self.num_layers


def runs(layers: tuple[int, ...]) -> str:
    """Ascending layers as text: ``0-3, 7``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(
        str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts
    )
