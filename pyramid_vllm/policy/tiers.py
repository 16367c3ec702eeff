"""Tiers: runs of consecutive full-attention layers that share one count."""

from dataclasses import dataclass

from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.errors import KVPolicyError

_AUTO_TIERS = range(4, 9)


@dataclass(frozen=True)
class TierLayout:
    """``num_layers`` full-attention layers cut into ``num_tiers`` runs, first to last.

    Where the number of tiers does not divide the layers, the first tiers have one
    layer more.
    """

    num_layers: int
    num_tiers: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers of each tier."""
        size, longer = divmod(self.num_layers, self.num_tiers)
        return tuple(size + (tier < longer) for tier in range(self.num_tiers))

    @property
    def tier_of_layer(self) -> tuple[int, ...]:
        """Tier of each layer."""
        return tuple(tier for tier, size in enumerate(self.sizes) for _ in range(size))

    @property
    def group_size(self) -> int:
        """Layers of one KV cache group: vLLM gives all groups the same number."""
        smallest, largest = min(self.sizes), max(self.sizes)
        return largest if largest < 1.5 * smallest else smallest

    @property
    def groups_per_tier(self) -> tuple[int, ...]:
        """KV cache groups that vLLM makes of each tier."""
        return tuple(-(-size // self.group_size) for size in self.sizes)

    @property
    def num_padding_layers(self) -> int:
        """Layers' worth of memory that equal groups waste."""
        return self.group_size * sum(self.groups_per_tier) - self.num_layers


def tier_layout(config: PolicyConfig, num_layers: int) -> TierLayout:
    """Cut a model's full-attention layers into the policy's tiers.

    Raises:
        KVPolicyError: the model has no full-attention layer, or fewer than tiers.
    """
    if num_layers < 1:
        raise KVPolicyError(
            f"kv_policy '{config.name}' needs layers with full attention: "
            "this model has none"
        )
    if config.tiers == "layers":
        return TierLayout(num_layers, num_layers)
    if config.tiers == "auto":
        return _auto_layout(num_layers)
    if config.tiers > num_layers:
        raise KVPolicyError(
            f"KV policy '{config.name}': setting 'tiers' is {config.tiers}: valid is "
            f"1 to {num_layers}, the model's full-attention layers, 'auto' or 'layers'"
        )
    return TierLayout(num_layers, config.tiers)


def _auto_layout(num_layers: int) -> TierLayout:
    """The fewest of 4 to 8 tiers among those that waste the least memory."""
    layouts = [
        TierLayout(num_layers, tiers) for tiers in _AUTO_TIERS if tiers <= num_layers
    ]
    if not layouts:
        return TierLayout(num_layers, num_layers)
    return min(layouts, key=lambda layout: layout.num_padding_layers)
