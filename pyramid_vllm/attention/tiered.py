"""Mixins of wrapped backends: metadata by tier, and work after attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from pyramid_vllm.spec import TierAttentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


class TierMetadata(Protocol):
    """A step's lengths and slots. The worker binds it to each tier's builder."""

    shared: dict[Hashable, Any]

    def first_like(self, tier: int, common: CommonAttentionMetadata) -> int | None:
        """The first tier with the lengths and rows of ``tier``; None outside steps."""

    def for_tier(
        self, tier: int, common: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """``common`` with the tier's lengths; its slots are written in place."""


class TierLayer(Protocol):
    """One layer of the policy. The worker binds it to the layer's attention."""

    @property
    def is_active(self) -> bool:
        """Whether this step needs the layer's queries."""

    def after_attention(self, query: torch.Tensor) -> None:
        """Score, select, prune and compact once the layer's attention has run."""


class TieredBuilder:
    """Mixin of stock builders: metadata from a tier's lengths. Unbound, it is stock.

    Captured graphs need the lengths in the same buffer at capture and replay.
    """

    tiers: TierMetadata | None = None
    tier = -1
    kv_cache_spec: Any

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """The metadata of one step for this builder's group."""
        stock: Any = super()
        common, tiers = common_attn_metadata, self.tiers
        if tiers is None:
            return stock.build(common_prefix_len, common, fast_build)
        like = tiers.first_like(self.tier, common)
        key = like, self._kind
        built = None if like is None else tiers.shared.get(key)
        if built is not None:
            # Such tiers differ in their pages alone.
            return dataclasses.replace(
                built,
                block_table=common.block_table_tensor,
                slot_mapping=common.slot_mapping,
            )
        common = tiers.for_tier(self.tier, common)
        built = stock.build(common_prefix_len, common, fast_build)
        if like is not None and self.is_shareable(built):
            tiers.shared[key] = built
        return built

    @cached_property
    def _kind(self) -> Hashable:
        """What builders have in common whose metadata can serve each other's tiers."""
        num_heads = getattr(self, "num_heads", None) or getattr(self, "num_heads_q", 0)
        # As text, which is hashed once.
        return num_heads, repr(dataclasses.replace(self.kv_cache_spec, tier=0))

    @staticmethod
    def is_shareable(built: Any) -> bool:
        """Whether metadata holds nothing of its builder, such as buffers that captured
        graphs read."""
        return (
            _fields_of(built.__class__).issuperset({"block_table", "slot_mapping"})
            and getattr(built, "scheduler_metadata", None) is None
        )

    def bind(self, tiers: TierMetadata, tier: int) -> None:
        """Build the metadata of one tier from now on."""
        self.tiers, self.tier = tiers, tier
        # Otherwise the next tier would reuse this tier's lengths.
        self.supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """In tiers at most decode steps: layers cannot score in a replayed prompt.

        Layers of other specs may belong to an engine without a policy.
        """
        stock: Any = super()
        support: AttentionCGSupport
        support = stock.get_cudagraph_support(vllm_config, kv_cache_spec)
        if not isinstance(kv_cache_spec, TierAttentionSpec):
            return support
        return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda one: one.value)


@cache
def _fields_of(metadata: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(metadata))


class TieredImpl:
    """Mixin of stock implementations: the layer's policy runs after attention."""

    tier_layer: TierLayer | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See the stock implementation."""
        stock: Any = super()
        output: torch.Tensor = stock.forward(
            layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
        )
        part = self.tier_layer
        # vLLM's memory profiling steps have no metadata.
        if part is not None and attn_metadata is not None and part.is_active:
            part.after_attention(query)
        return output


class TieredBackend:
    """Mixin of stock backends; keeps the backend's name."""
