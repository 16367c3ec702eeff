"""vLLM's ``TRITON_ATTN`` with a KV policy."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from pyramid_vllm.attention.tiered import (
    TieredBackend,
    TieredBuilder,
    TieredImpl,
)


class PyramidTritonMetadataBuilder(TieredBuilder, TritonAttentionMetadataBuilder):
    """Builds a tier's metadata from cache lengths; unbound, it is the stock builder."""


class PyramidTritonImpl(TieredImpl, TritonAttentionImpl):
    """Runs stock attention, then the layer's compaction; unbound, it is stock."""


class PyramidTritonBackend(TieredBackend, TritonAttentionBackend):
    """``TRITON_ATTN`` with a KV policy."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """The attention implementation."""
        return PyramidTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        """The metadata builder."""
        return PyramidTritonMetadataBuilder
