"""``window_scores`` and its kin for all requests of a step, in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.normalizer_triton import (
    load_queries,
    logits_of,
    max_requests,
    normalizers,
    scale_of,
)
from pyramid_vllm.kernels.pool_triton import pool_scores
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
from pyramid_vllm.kernels.scratch import Scratch

__all__ = [
    "ACCUMULATED",
    "ATTENTION",
    "VOTES",
    "pool_scores",
    "score",
]

#: What a token's score is of the attention that it gets.
ATTENTION, ACCUMULATED, VOTES = range(3)


@kernel
def _score_kernel(  # type: ignore[no-untyped-def]
    query, addresses, like, table, row, query_start, ring_start, num_queries, num_held,
    layers, query_scale, key_scales, num_requests, ring, scale, soft_cap,
    ql, qr, qh, qd, sb, sh, st, sd, table_stride, column, num_columns, offset,
    normalizer, norm_request, norm_head, out, out_layer, out_head, distance_weight,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, SOFT_CAP: tl.constexpr, Q_KIND: tl.constexpr,
    K_KIND: tl.constexpr, ALIGNMENT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Scores of some tokens: the weighted sum of their columns of the attention."""
    layer, request, head = program_of(num_requests, HEADS)
    columns, count = tl.load(num_columns + request), tl.load(num_queries + request)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if (tl.program_id(1) * BLOCK_N >= columns) | (count == 0):
        return
    held = tl.load(num_held + request)
    tokens, dims = tl.load(column + request) + n, tl.arange(0, BLOCK_D)
    pages = layer_pointer(addresses, layer, like, ALIGNMENT)
    scale = scale * tl.load(query_scale) * scale_of(key_scales, layer)
    request_table = table + tl.load(row + request).to(tl.int64) * table_stride
    k = load_keys(
        pages, request_table, tokens, held, head, dims, sb, sh, st, sd, PAGE, D, K_KIND
    )
    start, ring_first = tl.load(query_start + request), tl.load(ring_start + request)
    norms = normalizer + (layer * num_requests + request) * norm_request
    # Weights rise from 1 to `distance_weight`; a single query has the oldest's.
    slope = (distance_weight - 1.0) / tl.maximum(count - 1, 1)
    mean = 1.0 + slope * (count - 1) / 2.0
    total = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, count * GROUP, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        place = m // GROUP
        inside = place < count
        q = load_queries(
            query + tl.load(layers + layer) * ql, start, ring_first, ring, place,
            head * GROUP + m % GROUP, dims, inside, qr, qh, qd, D, Q_KIND,
        )  # fmt: skip
        norm = tl.load(norms + head * norm_head + m, mask=inside, other=float("inf"))
        logits = logits_of(q, k, scale, soft_cap, DTYPE, SOFT_CAP)
        seen = held - count + place + 1
        share = tl.exp(logits - norm[:, None])
        share = tl.where(tokens[None, :] < seen[:, None], share, 0.0)
        if KIND == 2:
            share = tl.where(share * seen[:, None] >= 1.0, 1.0, 0.0)
        if KIND == 0:
            share = share * ((1.0 + slope * place) / (count * mean))[:, None]
        total += tl.sum(tl.where(inside[:, None], share, 0.0), 0)
    at = out + layer * out_layer + head * out_head + tl.load(offset + request)
    tl.store(at + n, total / GROUP, mask=n < columns)


def score(
    query: torch.Tensor, query_layers: torch.Tensor, keys: PagedLayers,
    block_table: torch.Tensor, spans: Spans, out: torch.Tensor, *, max_queries: int,
    max_tokens: int, max_columns: int, scale: float, query_scale: torch.Tensor,
    key_scales: torch.Tensor, distance_weight: float = 1.0, kind: int = ATTENTION,
    logits_soft_cap: float = 0.0, sink_logits: torch.Tensor | None = None,
    ring: int | None = None, scratch: Scratch | None = None,
) -> None:  # fmt: skip
    """``window_scores``, ``accumulated_scores`` or ``vote_scores``, on paged keys.

    Args:
        query: ``[num_query_layers, num_rows, num_heads, head_size]``, any strides,
            the keys' dtype or one that they are quantized from.
        query_layers: ``[num_layers]``, int64: which of these belongs to each layer.
        keys: the layers' keys.
        block_table: ``[num_rows, max_blocks]``, int32, rows contiguous.
        spans: the requests; read are ``row``, ``query_start``, ``ring_start``,
            ``num_queries``, ``num_held``, ``column``, ``num_columns``, ``offset``.
        out: ``[num_layers, num_kv_heads, num_scores]``, float32.
        max_queries: most queries of a request; next: most tokens held, and scored.
        scale: factor of the attention logits.
        query_scale: ``[1]``, float32: factor of quantized queries, else 1.
        key_scales: ``[num_layers]``, int64: address of each layer's float32 factor of
            its quantized keys, else of 1.
        distance_weight: weight of the newest query; next: which score.
        logits_soft_cap: ``cap * tanh(logits / cap)`` where it is not 0.
        sink_logits: ``[num_layers, num_heads]``, what else shares in the attention.
        ring: rows of each request's ring of queries; None: its queries lie in order.
        scratch: memory that calls share; None: each allocates its own.
    """
    constants = _constants(query, keys, max_queries, bool(logits_soft_cap))
    blocks = triton.cdiv(max_columns, constants["BLOCK_N"])
    like, most = as_bytes(keys.like), max_requests(query, keys, max_queries)
    for first in range(0, spans.num_requests, most):
        part = Spans(*(column[first : first + most] for column in spans))
        arguments = (
            as_bytes(query), keys.addresses, like, block_table, *part[:5], query_layers,
            query_scale, key_scales, part.num_requests, ring or 1 << 30, scale,
            logits_soft_cap or 1.0, *query.stride(), *like.stride(),
            block_table.stride(0),
        )  # fmt: skip
        norms = normalizers(
            arguments, constants, max_queries, max_tokens, sink_logits,
            scratch or Scratch(query.device),
        )  # fmt: skip
        _score_kernel[(len(norms) * norms.shape[1], blocks)](
            *arguments, part.column, part.num_columns, part.offset, norms,
            *norms.stride()[:2], out, *out.stride()[:2], distance_weight, KIND=kind,
            **constants,
        )  # fmt: skip


def _constants(
    query: torch.Tensor, keys: PagedLayers, max_queries: int, has_soft_cap: bool
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    heads, page, head_size = keys.like.shape[1:]
    group, dtype = query.shape[2] // heads, _dot_dtype(query.dtype, keys.like.dtype)
    wide = dtype == tl.float32
    block_m, block_n = _sizes(head_size, wide, max_queries * group)
    return {
        "HEADS": heads, "GROUP": group, "D": head_size, "PAGE": page,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_M": block_m, "BLOCK_N": block_n, "DTYPE": dtype,
        "Q_KIND": float_kind(query.dtype), "K_KIND": float_kind(keys.like.dtype),
        "ALIGNMENT": keys.alignment, "num_stages": 2, "num_warps": 8 if wide else 4,
        "SOFT_CAP": has_soft_cap,
    }  # fmt: skip


def _sizes(head_size: int, wide: bool, rows: int) -> tuple[int, int]:
    """Rows and tokens of a block: as many as a GPU's shared memory takes."""
    if INTERPRETED:
        return 128, 256
    most = max(16, min(64, 8192 // (head_size * (2 if wide else 1))))
    most = 1 << most.bit_length() - 1
    return max(16, min(most, triton.next_power_of_2(rows))), most


def _dot_dtype(query: torch.dtype, key: torch.dtype) -> tl.dtype:
    """What queries and keys are multiplied in: it holds both exactly."""
    if INTERPRETED:
        return tl.float32
    wide = {dtype for dtype in (query, key) if dtype.itemsize > 1}
    if wide == {torch.float16}:
        return tl.float16
    return tl.bfloat16 if wide <= {torch.bfloat16} else tl.float32
