"""``key_norm_scores`` for all requests of a step, in one launch."""

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
