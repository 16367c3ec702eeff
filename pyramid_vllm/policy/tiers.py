"""Tiers: full-attention layers that share one count, grouped by depth or by weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.errors import KVPolicyError

_AUTO_TIERS = range(4, 9)
#: Most tiers first: they follow the weights more closely. Each tier costs time.
_AUTO_TIERS_BY_WEIGHT = range(6, 3, -1)


@dataclass(frozen=True)
class TierLayout:
    """``num_layers`` full-attention layers cut into ``num_tiers`` runs, first to last.

    If the layers do not divide evenly, the first tiers have one layer more.
    """

    num_layers: int
    num_tiers: int
    order: tuple[int, ...] | None = None
    """Layers in the order in which they are cut into tiers; None: by depth."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of layers of each tier."""
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


def tier_layout(config: PolicyConfig, num_layers: int) -> TierLayout:
    """Cut a model's full-attention layers into the policy's tiers.

    Raises:
        KVPolicyError: the model has no full-attention layer, or fewer layers than
            ``tiers``.
    """
    if num_layers < 1:
        raise KVPolicyError(
            f"kv_policy '{config.name}' needs layers with full attention: "
            "this model has none"
        )
    order = _order(config, num_layers)
    if config.tiers == "layers":
        return TierLayout(num_layers, num_layers, order)
    if config.tiers == "auto":
        tried = _AUTO_TIERS if order is None else _AUTO_TIERS_BY_WEIGHT
        return TierLayout(num_layers, _auto_tiers(num_layers, tried), order)
    if config.tiers > num_layers:
        raise KVPolicyError(
            f"KV policy '{config.name}': setting 'tiers' is {config.tiers}: valid is "
            f"1 to {num_layers}, the model's full-attention layers, 'auto' or 'layers'"
        )
    return TierLayout(num_layers, config.tiers, order)


def _order(config: PolicyConfig, num_layers: int) -> tuple[int, ...] | None:
    """Layers by falling weight, so that a tier's layers have similar weights."""
    weights = config.given_weights
    if weights is None:
        return None
    if len(weights) != num_layers:
        raise KVPolicyError(
            f"KV policy '{config.name}': setting 'layer_weights' has {len(weights)} "
            f"numbers: valid is one for each of the model's {num_layers} layers with "
            "full attention"
        )
    if config.prune_from is not None:
        return None  # all deeper layers lack the rows that a tier drops
    return tuple(sorted(range(num_layers), key=lambda layer: -weights[layer]))


def _auto_tiers(num_layers: int, tried: range) -> int:
    """The first number in ``tried`` that wastes the least memory."""
    layouts = [TierLayout(num_layers, tiers) for tiers in tried if tiers <= num_layers]
    if not layouts:
        return num_layers
    return min(layouts, key=lambda layout: layout.num_padding_layers).num_tiers
