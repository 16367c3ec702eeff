"""vLLM's CPU attention with a KV policy."""

from __future__ import annotations

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from pyramid_vllm.attention.access import KVAccess
from pyramid_vllm.attention.layout import KVViews, check_layout
from pyramid_vllm.attention.tiered import (
    TieredBackend,
    TieredBuilder,
    TieredImpl,
)
from pyramid_vllm.kernels import on_torch
from pyramid_vllm.kernels.kernel_set import KernelSet
from pyramid_vllm.policy import KVPolicyError


def cpu_views(cache: torch.Tensor) -> KVViews:
    """Views of ``CPU_ATTN``'s cache on x86 without AMX (isa ``vec`` and ``vec16``).

    For each KV head a block is ``[block_size, 2 * head_size]``: first the keys as
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
        KVPolicyError: this machine's kernels have another layout.
    """

    def write(
        cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        blocks, heads, block_size, width = cache.shape
        halves = cache.view(blocks, heads, block_size * 2, width // 2)
        key_cache, value_cache = halves.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)

    check_layout(f"CPU_ATTN {isa}", cache, cpu_views, write)


class PyramidCPUMetadataBuilder(TieredBuilder, CPUAttentionMetadataBuilder):
    """Builds a tier's metadata from cache lengths; unbound, it is the stock builder."""

    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
        """The stock value: there are no graphs on CPUs."""
        return CPUAttentionMetadataBuilder.get_cudagraph_support(*args, **kwargs)

    @staticmethod
    def is_shareable(built: Any) -> bool:
        """Always: no graph reads what a builder has made."""
        return True


class CPUAccess(KVAccess):
    """``CPU_ATTN``'s cache."""

    def views(self, cache: torch.Tensor) -> KVViews:
        """See ``cpu_views``."""
        return cpu_views(cache)

    def kernels(self) -> KernelSet:
        """The torch kernels."""
        return on_torch

    def check(self, builder: Any) -> None:
        """See ``check_cpu_layout``.

        Raises:
            KVPolicyError: also for quantized keys, which the torch kernels do not read.
        """
        cache = self.layer.kv_cache
        if cache.dtype == torch.uint8:
            raise KVPolicyError(
                "kv_policy does not support kv_cache_dtype="
                f"{self.impl.kv_cache_dtype!r} with CPU_ATTN: valid is 'auto'"
            )
        check_cpu_layout(cache, builder.isa)


class PyramidCPUAttentionImpl(TieredImpl, CPUAttentionBackendImpl):
    """Runs stock attention, then the layer's compaction; unbound, it is stock."""


class PyramidCPUAttentionBackend(TieredBackend, CPUAttentionBackend):
    """``CPU_ATTN`` with a KV policy."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention implementation."""
        return PyramidCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The metadata builder."""
        return PyramidCPUMetadataBuilder
