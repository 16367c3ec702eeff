"""What the kernels of one step know of its requests, and pointers to paged caches."""

from __future__ import annotations

import os
from functools import partial

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.spans import PagedLayers, Spans, as_bytes

__all__ = [
    "INTERPRETED",
    "PagedLayers",
    "Spans",
    "as_bytes",
    "as_float",
    "float_kind",
    "kernel",
    "layer_pointer",
    "load_keys",
    "program_of",
]

#: Whether kernels run on the CPU, interpreted: larger blocks, for each costs Python.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Arguments that differ from step to step, or from layer to layer: specialized on their
#: values and alignments, kernels would be compiled again while requests wait.
_OF_A_STEP = [
    "table", "row", "query_start", "ring_start", "num_queries", "num_held",
    "num_kept", "num_first", "num_recent", "column", "num_columns", "offset",
    "kept", "targets", "targets_stride", "moved_scratch", "out", "scores", "normalizer",
    "start", "first", "missing", "target",
    "positions", "seq_lens", "query_starts", "evicted", "num_rows", "row_starts",
    "starts", "next_starts", "window_of", "index", "num_requests", "num_slots",
    "max_requests", "ring", "table_stride", "kept_layer", "kept_group",
    "score_layer", "score_group", "out_layer", "out_group", "out_head",
    "out_request", "out_split", "norm_request", "norm_head", "layer_stride",
    "head_stride", "addresses", "keys", "values", "layers", "key_scales",
    "query_scale", "tags", "split", "num_splits", "rows", "partial", "sinks",
    "part_batch", "part_head", "part_split", "out_batch", "tier_of_group", "tables",
    "table_strides", "tier_lens", "slots", "page", "lens_stride", "slots_stride",
]  # fmt: skip
kernel = partial(triton.jit, do_not_specialize=_OF_A_STEP)


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
