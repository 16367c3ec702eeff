"""The wrapped attention backends."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

if TYPE_CHECKING:
    from pyramid_vllm.attention.access import KVAccess

#: By vLLM's backend. Classes are named, not imported: a backend's module may need
#: libraries that other machines lack.
WRAPPED = {
    AttentionBackendEnum.CPU_ATTN: "cpu.PyramidCPUAttentionBackend",
    AttentionBackendEnum.TRITON_ATTN: "triton.PyramidTritonBackend",
    AttentionBackendEnum.FLASH_ATTN: "flash.PyramidFlashBackend",
    AttentionBackendEnum.FLASHINFER: "flashinfer.PyramidFlashInferBackend",
}


@functools.cache
def register_backends() -> None:
    """Replace the stock backends by ours in this process. Idempotent."""
    from vllm.v1.attention.selector import _cached_get_attn_backend

    for backend, path in WRAPPED.items():
        register_backend(backend, f"pyramid_vllm.attention.{path}")
    # A stock engine in this process may have cached its choice.
    _cached_get_attn_backend.cache_clear()


def access_of(layer: Any) -> KVAccess:
    """Access to a layer's cache, whatever its backend among those that are wrapped."""
    if layer.attn_backend.get_name() == "CPU_ATTN":
        from pyramid_vllm.attention.cpu import CPUAccess

        return CPUAccess(layer)
    from pyramid_vllm.attention.device import DeviceAccess

    return DeviceAccess(layer)
