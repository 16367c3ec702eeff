"""Mixins of wrapped backends: metadata by tier, and work after attention."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata


class TierMetadata(Protocol):
    """A step's lengths and slots. The worker binds it to each tier's builder."""

    shared: dict[Hashable, Any]

    @property
    def has_stock_lengths(self) -> bool:
        """Whether all tiers have stock vLLM's lengths and rows."""

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

    # Otherwise the next tier would reuse this tier's lengths.
    supports_update_block_table = False
    tiers: TierMetadata | None = None
    tier = -1

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """The metadata of one step for this builder's group."""
        if self.tiers is not None:
            common_attn_metadata = self.tiers.for_tier(self.tier, common_attn_metadata)
        stock: Any = super()
        return stock.build(common_prefix_len, common_attn_metadata, fast_build)

    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
        """At most decode steps: layers cannot score in a replayed prompt."""
        stock: Any = super()
        support: AttentionCGSupport = stock.get_cudagraph_support(*args, **kwargs)
        most = AttentionCGSupport.UNIFORM_BATCH
        return support if support.value < most.value else most


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
