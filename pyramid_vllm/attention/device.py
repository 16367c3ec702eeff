"""KV caches of the GPU backends: one layout, also with eight-bit floats."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pyramid_vllm.attention.access import KVAccess
from pyramid_vllm.attention.layout import KVViews, check_layout, split_views
from pyramid_vllm.kernels import on_triton
from pyramid_vllm.kernels.kernel_set import KernelSet

_FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class DeviceAccess(KVAccess):
    """The KV cache of the GPU backends."""

    def views(self, cache: torch.Tensor) -> KVViews:
        """Views of keys and values; bytes are viewed as eight-bit floats."""
        dtype = _FLOAT8.get(self.impl.kv_cache_dtype)
        typed = cache if dtype is None else cache.view(dtype)
        return split_views(typed, self.impl.head_size)

    def kernels(self) -> KernelSet:
        """The Triton kernels."""
        return on_triton

    def check(self, builder: Any) -> None:
        """Check ``views`` against the backend's own write.

        Raises:
            KVPolicyError: the backend has another layout.
        """
        cache, impl = self.layer.kv_cache, self.impl
        one = torch.ones(1, dtype=torch.float32, device=cache.device)
        scales = SimpleNamespace(_k_scale=one, _v_scale=one)

        def write(
            cache: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            slots: torch.Tensor,
        ) -> None:
            impl.do_kv_cache_update(scales, key, value, cache, slots)

        name = f"{type(impl).__name__} {impl.kv_cache_dtype}"
        quantized = impl.kv_cache_dtype in _FLOAT8
        dtype = torch.bfloat16 if quantized else cache.dtype
        check_layout(name, cache, self.views, write, dtype)
