"""What every wrapped backend has in common: a tier's metadata, a layer's part."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata


class TierMetadata(Protocol):
    """A step's lengths and slots; bound to the builder of each tier by the worker."""

    shared: dict[Hashable, Any]

    @property
    def has_stock_lengths(self) -> bool:
        """Whether all tiers have the lengths and rows of stock vLLM."""

    def for_tier(
        self, tier: int, common: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """The same metadata with the tier's lengths, its slots written in place."""


class TierLayer(Protocol):
    """One layer's part in the policy; bound to its attention by the worker."""

    @property
    def is_active(self) -> bool:
        """Whether this step needs the layer's queries."""

    def after_attention(self, query: torch.Tensor) -> None:
        """Score, select, prune and compact once the layer's attention has run."""


class TieredBuilder:
    """Mixed into a stock builder: metadata from a tier's lengths. Unbound, it is stock.

    For captured graphs the lengths lie in one buffer, the same at capture and replay.
    """

    # Else one tier's lengths would be reused for the next tier.
    supports_update_block_table = False
    tiers: TierMetadata | None = None
    tier = -1

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Metadata of one step for this builder's group."""
        if self.tiers is not None:
            common_attn_metadata = self.tiers.for_tier(self.tier, common_attn_metadata)
        stock: Any = super()
        return stock.build(common_prefix_len, common_attn_metadata, fast_build)

    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
        """Decode steps at most: in a replayed prompt no layer could score."""
        stock: Any = super()
        support: AttentionCGSupport = stock.get_cudagraph_support(*args, **kwargs)
        most = AttentionCGSupport.UNIFORM_BATCH
        return support if support.value < most.value else most


class TieredImpl:
    """Mixed into a stock implementation: its layer's part follows the attention."""

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
        # Steps in which vLLM profiles its memory have no metadata.
        if part is not None and attn_metadata is not None and part.is_active:
            part.after_attention(query)
        return output


class TieredBackend:
    """Mixed into a stock backend, whose name it keeps."""
