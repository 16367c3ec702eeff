"""The backends that are wrapped, by vLLM's names."""

from __future__ import annotations

import functools

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

#: By vLLM's name of the backend. Classes are named, not imported: a backend's module
#: needs libraries that only machines which choose it have.
WRAPPED = {
    AttentionBackendEnum.CPU_ATTN: "cpu.PyramidCPUAttentionBackend",
    AttentionBackendEnum.TRITON_ATTN: "triton.PyramidTritonBackend",
    AttentionBackendEnum.FLASH_ATTN: "flash.PyramidFlashBackend",
    AttentionBackendEnum.FLASHINFER: "flashinfer.PyramidFlashInferBackend",
}


@functools.cache
def register_backends() -> None:
    """Put our backends in the places of the stock ones, in this process. Idempotent."""
    from vllm.v1.attention.selector import _cached_get_attn_backend

    for backend, path in WRAPPED.items():
        register_backend(backend, f"pyramid_vllm.attention.{path}")
    # A stock engine of the same process may have chosen already.
    _cached_get_attn_backend.cache_clear()
