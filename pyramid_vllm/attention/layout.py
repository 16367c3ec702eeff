"""Where a backend keeps each token's key and value, checked by writing and reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from pyramid_vllm.policy import KVPolicyError


class KVViews(NamedTuple):
    """Strided views of one layer's paged cache.

    Both are ``[num_blocks, num_kv_heads, block_size, head_size]``: writing to them
    writes to the cache.
    """

    key: torch.Tensor
    value: torch.Tensor


#: From a layer's raw cache to its views.
KVLayout = Callable[[torch.Tensor], KVViews]
#: Writes keys and values ``[num_tokens, num_kv_heads, head_size]`` to int64 slots.
WriteKV = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def check_layout(
    name: str, like: torch.Tensor, layout: KVLayout, write: WriteKV
) -> None:
    """Write known tokens through the backend's own operator and read them back.

    Args:
        name: the layout's name, for the error.
        like: a layer's cache; the check runs on a small one of its kind.
        layout: the views under test.
        write: the backend's operator, given the cache, keys, values and slots.

    Raises:
        KVPolicyError: the tokens do not lie where the views say.
    """
    num_blocks = 3
    cache = torch.zeros(num_blocks, *like.shape[1:], dtype=like.dtype)
    _, num_kv_heads, block_size, width = cache.shape
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:-3]
    shape = (2, len(slots), num_kv_heads, width // 2)
    key, value = torch.randn(shape, generator=generator).to(like.dtype)
    write(cache, key, value, slots)
    views, block, offset = layout(cache), slots // block_size, slots % block_size
    if not (
        torch.equal(views.key[block, :, offset], key)
        and torch.equal(views.value[block, :, offset], value)
    ):
        raise KVPolicyError(
            f"kv_policy does not know the KV cache layout '{name}' for dtype "
            f"{like.dtype}, block_size={block_size}, head_size={width // 2}"
        )
