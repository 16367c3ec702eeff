"""What the kernels of one step know of its requests, and pointers to paged caches."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

#: Whether kernels run on the CPU, interpreted: larger blocks, for each costs Python.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Arguments that differ from step to step, or from layer to layer: specialized on their
#: values and alignments, kernels would be compiled again while requests wait.
_OF_A_STEP = [
    "table", "row", "query_start", "ring_start", "num_queries", "num_held",
    "num_kept", "num_first", "num_recent", "column", "num_columns", "offset",
    "kept", "out", "scores", "normalizer", "start", "first", "missing", "target",
    "positions", "seq_lens", "query_starts", "evicted", "num_rows", "row_starts",
    "starts", "next_starts", "window_of", "index", "num_requests", "num_slots",
    "max_requests", "ring", "table_stride", "kept_layer", "kept_group",
    "score_layer", "score_group", "out_layer", "out_group", "out_head",
    "out_request", "out_split", "norm_request", "norm_head", "layer_stride",
    "head_stride", "addresses", "keys", "values", "layers", "key_scales",
    "query_scale", "tags",
]  # fmt: skip
kernel = partial(triton.jit, do_not_specialize=_OF_A_STEP)


class Spans(NamedTuple):
    """Requests of one launch, as columns of a device buffer.

    All are ``[num_requests]``, int32, contiguous. A request's tokens lie in its pages
    in order; its scores and kept indices lie in flat buffers, from ``offset`` on.
    """

    row: torch.Tensor
    """Row of the block table."""
    query_start: torch.Tensor
    """First row of its queries, or of its ring of them."""
    ring_start: torch.Tensor
    """Place of the oldest query in the ring; 0 where there is none."""
    num_queries: torch.Tensor
    """Queries that score, the newest of the request; 0: it is not scored."""
    num_held: torch.Tensor
    """Tokens in the pages."""
    num_kept: torch.Tensor
    """Tokens that stay; equal to ``num_held``: nothing moves."""
    num_first: torch.Tensor
    """First tokens that stay whatever their score."""
    num_recent: torch.Tensor
    """Newest tokens that stay whatever their score."""
    column: torch.Tensor
    """First token that has a score."""
    num_columns: torch.Tensor
    """Tokens that have a score."""
    offset: torch.Tensor
    """Place of its first score, and of its first kept index."""

    @classmethod
    def of(cls, buffer: torch.Tensor) -> Spans:
        """The fields of ``[len(Spans._fields), num_requests]``."""
        return cls(*buffer.unbind(0))

    @property
    def num_requests(self) -> int:
        """Requests."""
        return self.row.shape[0]


class PagedLayers(NamedTuple):
    """Keys or values of several layers whose pages have one shape and one dtype.

    Kernels reach each layer by its address.
    """

    like: torch.Tensor
    """One layer's ``[num_blocks, num_kv_heads, block_size, head_size]``, any strides:
    those of all."""
    addresses: torch.Tensor
    """``[num_layers]``, int64, on the layers' device."""
    alignment: int = 1
    """Bytes, at most 16, that all addresses are multiples of: several elements are
    read at once where that is known."""

    @classmethod
    def of(cls, caches: list[torch.Tensor]) -> PagedLayers:
        """Of views that have one shape, one dtype and the same strides.

        Raises:
            ValueError: they differ.
        """
        like = caches[0]
        for cache in caches:
            if (
                cache.shape[1:] != like.shape[1:]
                or cache.stride() != like.stride()
                or cache.dtype != like.dtype
            ):
                raise ValueError(
                    f"pages of {tuple(cache.shape)}, strides {cache.stride()} and "
                    f"{cache.dtype}: valid are those of the other layers, "
                    f"{tuple(like.shape)}, {like.stride()} and {like.dtype}"
                )
        pointers = [cache.data_ptr() for cache in caches]
        addresses = torch.tensor(pointers, dtype=torch.int64, device=like.device)
        return cls(like, addresses, math.gcd(16, *pointers))

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self.addresses.shape[0]


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """Eight-bit floats as bytes; anything else as it is."""
    return values.view(torch.uint8) if values.dtype.itemsize == 1 else values


def float_kind(dtype: torch.dtype) -> int:
    """How ``as_float`` reads values of a dtype, from ``as_bytes``.

    Raises:
        ValueError: it does not.
    """
    kinds = {
        torch.float32: 0,
        torch.float16: 0,
        torch.bfloat16: 0,
        torch.float8_e4m3fn: 1,
        torch.float8_e5m2: 2,
    }
    if dtype not in kinds:
        raise ValueError(f"dtype={dtype}: valid are {', '.join(map(str, kinds))}")
    return kinds[dtype]


@triton.jit
def as_float(values, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Floats; eight-bit ones from their bytes, for Triton reads them on few GPUs."""
    if KIND != 0:
        bits = values.to(tl.uint16)
        # e4m3 is a half with three bits of fraction, its exponent eight too small.
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7) if KIND == 1 else bits << 8
        values = bits.to(tl.float16, bitcast=True).to(tl.float32)
        values = values * 256.0 if KIND == 1 else values
    return values


@triton.jit
def layer_pointer(addresses, layer, like, ALIGNMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Address of a layer's pages, typed as the pointer ``like``."""
    return tl.multiple_of(tl.load(addresses + layer).to(like.dtype), ALIGNMENT)


@triton.jit
def program_of(num_requests, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Layer, request and head of a program, wide enough for any offset."""
    program = tl.program_id(0)
    layer = program // HEADS // num_requests
    return (
        layer.to(tl.int64),
        program // HEADS % num_requests,
        (program % HEADS).to(tl.int64),
    )


@triton.jit
def load_keys(  # type: ignore[no-untyped-def]
    pages, table, tokens, seen, head, dims, sb, sh, st, sd, PAGE: tl.constexpr,
    D: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """``[dims, tokens]`` of a request's keys; zeros from token ``seen`` on."""
    visible = tokens < seen
    block = tl.load(table + tokens // PAGE, mask=visible, other=0).to(tl.int64)
    at = pages + block * sb + head * sh + (tokens % PAGE) * st
    inside = visible[None, :] & (dims[:, None] < D)
    keys = tl.load(at[None, :] + dims[:, None] * sd, mask=inside, other=0)
    return as_float(keys, KIND)
