"""vLLM's ``FLASHINFER`` with a KV policy."""

from __future__ import annotations

from typing import Any

import torch
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
from pyramid_vllm.spec import TierAttentionSpec


class PyramidFlashInferMetadataBuilder(TieredBuilder, FlashInferMetadataBuilder):
    """Builds a tier's metadata from cache lengths; unbound, it is the stock builder."""

    _plans: torch.Tensor | None = None
    """Where the wrappers of captured graphs have their plans, on the device."""

    def _get_decode_wrapper(self, *args: Any, **kwargs: Any) -> Any:
        """The stock wrapper. Those of captured graphs share one workspace for plans.

        Stock vLLM has a wrapper for each graph size, and each takes 8 MiB for its plan;
        tiers would multiply them. One size runs at a time, and its plan is written
        before, on the stream on which it runs.
        """
        wrapper = super()._get_decode_wrapper(*args, **kwargs)
        in_tier = isinstance(self.kv_cache_spec, TierAttentionSpec)
        if not (in_tier and wrapper.is_cuda_graph_enabled):
            return wrapper
        if self._plans is None:
            self._plans = wrapper._int_workspace_buffer
        if wrapper._int_workspace_buffer is not self._plans:
            wrapper.reset_workspace_buffer(self._get_workspace_buffer(), self._plans)
        return wrapper


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
