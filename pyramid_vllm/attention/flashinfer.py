"""vLLM's ``FLASHINFER`` with a KV policy."""

from __future__ import annotations

from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferImpl,
    FlashInferMetadataBuilder,
)

from pyramid_vllm.attention.tiered import (
    TieredBackend,
    TieredBuilder,
    TieredImpl,
)


class PyramidFlashInferMetadataBuilder(TieredBuilder, FlashInferMetadataBuilder):
    """Builds a tier's metadata from cache lengths; unbound, it is the stock builder."""


class PyramidFlashInferImpl(TieredImpl, FlashInferImpl):
    """Runs stock attention, then the layer's compaction; unbound, it is stock."""


class PyramidFlashInferBackend(TieredBackend, FlashInferBackend):
    """``FLASHINFER`` with a KV policy."""

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        """The attention implementation."""
        return PyramidFlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[FlashInferMetadataBuilder]:
        """The metadata builder."""
        return PyramidFlashInferMetadataBuilder
