"""Each CPU cache layout is proved by writing through vLLM's own operator."""

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from pyramid_vllm.attention import cpu
from pyramid_vllm.attention.layout import KVViews
from pyramid_vllm.policy import KVPolicyError

current_platform.import_kernels()


def layer_cache(dtype: torch.dtype, block_size: int, head_size: int) -> torch.Tensor:
    return torch.zeros(2, 3, block_size, 2 * head_size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
def test_written_tokens_are_read_back(
    dtype: torch.dtype, block_size: int, head_size: int
) -> None:
    """Passes where the views are right, or where this machine's layout is refused."""
    isa = _get_attn_isa(dtype, block_size, head_size, "auto")
    cache = layer_cache(dtype, block_size, head_size)
    if isa in ("vec", "vec16"):
        cpu.check_cpu_layout(cache, isa)
    else:
        with pytest.raises(KVPolicyError, match=isa):
            cpu.check_cpu_layout(cache, isa)


@pytest.mark.parametrize("wrong", ["key", "value"])
def test_an_unknown_layout_is_refused(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cpu.cpu_views

    def views(cache: torch.Tensor) -> KVViews:
        key, value = right(cache)
        return (
            KVViews(key.flip(2), value)
            if wrong == "key"
            else KVViews(key, value.flip(2))
        )

    monkeypatch.setattr(cpu, "cpu_views", views)
    with pytest.raises(KVPolicyError, match="does not know the KV cache layout"):
        cpu.check_cpu_layout(layer_cache(torch.float32, 32, 64), "vec")


def test_views_write_through() -> None:
    cache = layer_cache(torch.float32, 32, 64)
    views = cpu.cpu_views(cache)
    views.key[1, 2, 5] = 1.0
    views.value[1, 2, 5] = 2.0
    assert cache.sum() == 64 * 3.0
