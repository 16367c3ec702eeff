"""vLLM's ``FLASH_ATTN`` with a KV policy."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from pyramid_vllm.attention.tiered import (
    TieredBackend,
    TieredBuilder,
    TieredImpl,
)


class PyramidFlashMetadataBuilder(TieredBuilder, FlashAttentionMetadataBuilder):
    """Builds a tier's metadata from cache lengths; unbound, it is the stock builder."""


class PyramidFlashImpl(TieredImpl, FlashAttentionImpl):
    """Runs stock attention, then the layer's compaction; unbound, it is stock."""


class PyramidFlashBackend(TieredBackend, FlashAttentionBackend):
    """``FLASH_ATTN`` with a KV policy."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The attention implementation."""
        return PyramidFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """The metadata builder."""
        return PyramidFlashMetadataBuilder
