"""Layout of a backend's KV cache, checked by writing and reading it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from pyramid_vllm.policy import KVPolicyError


class KVViews(NamedTuple):
    """Strided views of one layer's paged cache.

    Both are ``[num_blocks, num_kv_heads, block_size, head_size]``. Writes to them go
    to the cache.
    """

    key: torch.Tensor
    value: torch.Tensor


#: Maps a layer's raw cache to its views.
KVLayout = Callable[[torch.Tensor], KVViews]
#: Writes keys and values ``[num_tokens, num_kv_heads, head_size]`` to int64 slots.
WriteKV = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def check_layout(
    name: str,
    like: torch.Tensor,
    layout: KVLayout,
    write: WriteKV,
    dtype: torch.dtype | None = None,
) -> None:
    """Write known tokens through the backend's own operator and read them back.

    Args:
        name: the layout's name, for the error.
        like: a layer's cache; the check runs on a small cache with its layout.
        layout: the views under test.
        write: the backend's operator, given the cache, keys, values and slots.
        dtype: of keys and values if the cache quantizes them, with factor 1.

    Raises:
        KVPolicyError: the views do not find the tokens.
    """
    num_blocks = 3
    cache = _small_cache(like, num_blocks)
    _, num_kv_heads, block_size, width = cache.shape
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:-3]
    shape = (2, len(slots), num_kv_heads, width // 2)
    # Integers that even eight-bit floats represent exactly.
    numbers = torch.randint(-8, 9, shape, generator=generator)
    key, value = numbers.to(like.device, dtype or like.dtype)
    slots = slots.to(like.device)
    write(cache, key, value, slots)
    views, block, offset = layout(cache), slots // block_size, slots % block_size
    if not (
        torch.equal(views.key[block, :, offset].to(key.dtype), key)
        and torch.equal(views.value[block, :, offset].to(key.dtype), value)
    ):
        raise KVPolicyError(
            f"kv_policy does not know the KV cache layout '{name}' for dtype "
            f"{like.dtype}, block_size={block_size}, head_size={width // 2}"
        )


def _small_cache(like: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """A few blocks of zeros, with the same order of dimensions in memory."""
    shape = (num_blocks, *like.shape[1:])
    order = sorted(range(len(shape)), key=like.stride, reverse=True)
    in_order = like.new_zeros([shape[dim] for dim in order])
    return in_order.permute([order.index(dim) for dim in range(len(shape))])


def split_views(cache: torch.Tensor, head_size: int) -> KVViews:
    """Views of a cache that stores each token's key before its value.

    This is the layout of all GPU backends: logically ``[num_blocks, num_kv_heads,
    block_size, 2 * head_size]``, with either order in memory (NHD or HND).
    """
    return KVViews(cache[..., :head_size], cache[..., head_size:])
