"""vLLM's CPU attention with a KV policy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, Protocol

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from pyramid_vllm.attention.layout import KVViews, check_layout
from pyramid_vllm.policy import KVPolicyError


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

    def after_attention(self, query: torch.Tensor, block_table: torch.Tensor) -> None:
        """Score, select, prune and compact once the layer's attention has run."""


def cpu_views(cache: torch.Tensor) -> KVViews:
    """Views of ``CPU_ATTN``'s cache on x86 without AMX (isa ``vec`` and ``vec16``).

    A block is ``[block_size, 2 * head_size]`` a KV head: first the keys as
    ``[head_size, block_size]``, then the values as ``[block_size, head_size]``.
    """
    num_blocks, num_kv_heads, block_size, width = cache.shape
    head_size = width // 2
    halves = cache.view(num_blocks, num_kv_heads, 2, block_size * head_size)
    shape = (num_blocks, num_kv_heads)
    key = halves[:, :, 0].view(*shape, head_size, block_size).transpose(2, 3)
    return KVViews(key, halves[:, :, 1].view(*shape, block_size, head_size))


def check_cpu_layout(cache: torch.Tensor, isa: str) -> None:
    """Check ``cpu_views`` for one layer's cache.

    Raises:
        KVPolicyError: this machine's kernels keep keys or values elsewhere.
    """

    def write(
        cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        blocks, heads, block_size, width = cache.shape
        halves = cache.view(blocks, heads, block_size * 2, width // 2)
        key_cache, value_cache = halves.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)

    check_layout(f"CPU_ATTN {isa}", cache, cpu_views, write)


class PyramidCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds a tier's metadata from cache lengths; unbound, it is the stock builder."""

    # Else one tier's lengths would be reused for the next tier.
    supports_update_block_table = False
    tiers: TierMetadata | None = None
    tier = -1

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """Metadata of one step for this builder's group."""
        tiers = self.tiers
        if tiers is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = tiers.for_tier(self.tier, common_attn_metadata)
        if not tiers.has_stock_lengths:
            return super().build(common_prefix_len, common, fast_build)
        # Tiers then differ in their pages alone: build once.
        key = (self.num_heads, self.num_kv_heads, self.head_dim, self.window_size)
        built = tiers.shared.get(key)
        if built is None:
            built = super().build(common_prefix_len, common, fast_build)
            tiers.shared[key] = built
        return dataclasses.replace(
            built,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )


class PyramidCPUAttentionImpl(CPUAttentionBackendImpl):
    """Runs stock attention, then the layer's compaction; unbound, it is stock."""

    tier_layer: TierLayer | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See the stock implementation."""
        output = super().forward(
            layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
        )
        tier_layer = self.tier_layer
        if (
            tier_layer is not None
            and attn_metadata is not None
            and tier_layer.is_active
        ):
            tier_layer.after_attention(query, attn_metadata.block_table)
        return output

    def check_movable(self) -> None:
        """Refuse attention that depends on a token's place in the cache.

        Raises:
            KVPolicyError: names the feature.
        """
        if self.alibi_slopes is not None:
            raise KVPolicyError(
                "kv_policy does not support attention with alibi_slopes"
            )


class PyramidCPUAttentionBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with a KV policy; keeps the stock name."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention implementation."""
        return PyramidCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The metadata builder."""
        return PyramidCPUMetadataBuilder


@functools.cache
def register_cpu_backend() -> None:
    """Put the backend in ``CPU_ATTN``'s place, in this process. Idempotent."""
    from vllm.v1.attention.selector import _cached_get_attn_backend

    register_backend(
        AttentionBackendEnum.CPU_ATTN,
        f"{__name__}.{PyramidCPUAttentionBackend.__qualname__}",
    )
    # A stock engine of the same process may have chosen already.
    _cached_get_attn_backend.cache_clear()
