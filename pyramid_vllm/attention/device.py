"""What the wrapped backends for GPUs share: caches of one layout, eight-bit floats."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pyramid_vllm.attention.layout import KVViews, check_layout, split_views
from pyramid_vllm.attention.tiered import TieredImpl

_FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class DeviceImpl(TieredImpl):
    """Mixed into a stock implementation for GPUs."""

    kv_cache_dtype: str
    head_size: int

    def cache_views(self, cache: torch.Tensor) -> KVViews:
        """A layer's cache as keys and values; bytes as the floats that they are."""
        dtype = _FLOAT8.get(self.kv_cache_dtype)
        typed = cache if dtype is None else cache.view(dtype)
        return split_views(typed, self.head_size)

    def check_cache(self, layer: Any, builder: Any) -> None:
        """Check the views by the backend's own write.

        Raises:
            KVPolicyError: this backend keeps keys or values elsewhere.
        """
        cache = layer.kv_cache
        one = torch.ones(1, dtype=torch.float32, device=cache.device)
        scales = SimpleNamespace(_k_scale=one, _v_scale=one)
        stock: Any = self

        def write(
            cache: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            slots: torch.Tensor,
        ) -> None:
            stock.do_kv_cache_update(scales, key, value, cache, slots)

        name = f"{type(self).__name__} {self.kv_cache_dtype}"
        quantized = self.kv_cache_dtype in _FLOAT8
        dtype = torch.bfloat16 if quantized else cache.dtype
        check_layout(name, cache, self.cache_views, write, dtype)
