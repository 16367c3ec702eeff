"""``key_norm_scores`` and ``key_diff_scores`` for all requests, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.requests_triton import (
    INTERPRETED,
    PagedLayers,
    Spans,
    as_bytes,
    float_kind,
    kernel,
    layer_pointer,
    load_keys,
    program_of,
)


@kernel
def _key_norm_kernel(  # type: ignore[no-untyped-def]
    addresses, like, table, row, num_held, column, offset, out, num_requests, sb, sh,
    st, sd, table_stride, out_layer, out_head,
    HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, K_KIND: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    layer, request, head = program_of(num_requests, HEADS)
    first = tl.load(column + request)
    start = first + tl.program_id(1) * BLOCK_N
    held = tl.load(num_held + request)
    if start >= held:
        return
    pages = layer_pointer(addresses, layer, like, ALIGNMENT)
    request_table = table + tl.load(row + request).to(tl.int64) * table_stride
    tokens, dims = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k = load_keys(
        pages, request_table, tokens, held, head, dims, sb, sh, st, sd, PAGE, D, K_KIND
    )
    k = k.to(tl.float32)
    at = out + layer * out_layer + head * out_head + tl.load(offset + request)
    tl.store(at + tokens - first, -tl.sqrt(tl.sum(k * k, 0)), mask=tokens < held)


def score_key_norms(
    keys: PagedLayers,
    block_table: torch.Tensor,
    spans: Spans,
    out: torch.Tensor,
    *,
    max_tokens: int,
) -> None:
    """``key_norm_scores`` of some requests in some layers; arguments as of ``score``.

    Factors of quantized keys are left out: they do not change a layer's order.
    """
    heads, page, head_size = keys.like.shape[1:]
    block_n = 256 if INTERPRETED else 32
    like = as_bytes(keys.like)
    batch = keys.num_layers * spans.num_requests
    _key_norm_kernel[(batch * heads, triton.cdiv(max_tokens, block_n))](
        keys.addresses, like, block_table, spans.row, spans.num_held, spans.column,
        spans.offset, out, spans.num_requests, *like.stride(), block_table.stride(0),
        *out.stride()[:2],
        HEADS=heads, D=head_size, PAGE=page,
        BLOCK_D=max(16, triton.next_power_of_2(head_size)), BLOCK_N=block_n,
        K_KIND=float_kind(keys.like.dtype), ALIGNMENT=keys.alignment,
    )  # fmt: skip


@triton.jit
def _unit_keys(  # type: ignore[no-untyped-def]
    pages, table, tokens, end, head, dims, sb, sh, st, sd, PAGE: tl.constexpr,
    D: tl.constexpr, K_KIND: tl.constexpr,
):  # fmt: skip
    """``[dims, tokens]``: keys of length 1; zeros from token ``end`` on."""
    k = load_keys(
        pages, table, tokens, end, head, dims, sb, sh, st, sd, PAGE, D, K_KIND
    ).to(tl.float32)
    return k / tl.maximum(tl.sqrt(tl.sum(k * k, 0)), 1e-12)[None, :]


@kernel
def _key_diff_kernel(  # type: ignore[no-untyped-def]
    addresses, like, table, row, column, num_columns, offset, out, num_requests, sb, sh,
    st, sd, table_stride, out_layer, out_head,
    HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, K_KIND: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    layer, request, head = program_of(num_requests, HEADS)
    first, count = tl.load(column + request), tl.load(num_columns + request)
    pages = layer_pointer(addresses, layer, like, ALIGNMENT)
    request_table = table + tl.load(row + request).to(tl.int64) * table_stride
    dims, end = tl.arange(0, BLOCK_D), first + count
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        total += tl.sum(_unit_keys(
            pages, request_table, tokens, end, head, dims, sb, sh, st, sd, PAGE, D,
            K_KIND,
        ), 1)  # fmt: skip
    mean = total / tl.maximum(count, 1).to(tl.float32)
    at = out + layer * out_layer + head * out_head + tl.load(offset + request)
    for start in range(first, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        unit = _unit_keys(
            pages, request_table, tokens, end, head, dims, sb, sh, st, sd, PAGE, D,
            K_KIND,
        )  # fmt: skip
        likeness = tl.sum(unit * mean[:, None], 0)
        tl.store(at + tokens - first, -likeness, mask=tokens < end)


def score_key_diffs(
    keys: PagedLayers, block_table: torch.Tensor, spans: Spans, out: torch.Tensor
) -> None:
    """``key_diff_scores`` of the scored tokens of some requests in some layers;
    arguments as of ``score``."""
    heads, page, head_size = keys.like.shape[1:]
    like = as_bytes(keys.like)
    _key_diff_kernel[(keys.num_layers * spans.num_requests * heads,)](
        keys.addresses, like, block_table, spans.row, spans.column, spans.num_columns,
        spans.offset, out, spans.num_requests, *like.stride(), block_table.stride(0),
        *out.stride()[:2],
        HEADS=heads, D=head_size, PAGE=page,
        BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        BLOCK_N=256 if INTERPRETED else 32, K_KIND=float_kind(keys.like.dtype),
        ALIGNMENT=keys.alignment,
    )  # fmt: skip
