"""Keeping the newest queries of generating requests; runs inside captured graphs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.requests_triton import (
    Spans,
    as_bytes,
    as_float,
    float_kind,
    kernel,
)


@kernel
def _store_kernel(  # type: ignore[no-untyped-def]
    query, target, scale, buffer, positions, tags, query_row, query_head, query_dim,
    HEADS: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.load(target + row)
    if place < 0:
        return
    tl.store(tags + place, tl.load(positions + row))
    width: tl.constexpr = HEADS * D
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = query + row.to(tl.int64) * query_row + (i // D) * query_head
        value = tl.load(at + (i % D) * query_dim, mask=i < width)
        value = as_float(value, KIND).to(tl.float32) * tl.load(scale)
        to = buffer + place.to(tl.int64) * width + i
        tl.store(to, value.to(buffer.dtype.element_ty), mask=i < width)


def store_queries(
    query: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    tags: torch.Tensor,
) -> None:
    """Copy the queries of some rows to their places in a buffer.

    Args:
        query: ``[num_rows, num_heads, head_size]``, any strides.
        target: ``[num_rows]`` or longer, int32: each row's place; negative: none.
        positions: ``[num_rows]`` or longer, int32: each row's position, for ``tags``.
        scale: ``[1]``, float32: factor of quantized queries, else 1.
        out: ``[num_places, num_heads, head_size]``, contiguous.
        tags: ``[num_places]``, int32: positions of the queries that lie there.
    """
    num_rows, heads, head_size = query.shape
    _store_kernel[(num_rows,)](
        as_bytes(query), target, scale, out, positions, tags, *query.stride(),
        HEADS=heads, D=head_size, KIND=float_kind(query.dtype),
        BLOCK=min(1024, triton.next_power_of_2(heads * head_size)),
    )  # fmt: skip


@kernel
def _missing_kernel(  # type: ignore[no-untyped-def]
    tags, start, ring_start, num_queries, first, missing, ring, layer_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    count = tl.load(num_queries + request)
    place = tl.arange(0, BLOCK)
    row = tl.load(start + request) + (tl.load(ring_start + request) + place) % ring
    at = tags + tl.program_id(1).to(tl.int64) * layer_stride + row
    found = tl.load(at, mask=place < count, other=0)
    wrong = (place < count) & (found != tl.load(first + request) + place)
    tl.atomic_add(missing, tl.sum(wrong.to(tl.int32), 0))


def count_missing(
    tags: torch.Tensor,
    spans: Spans,
    first: torch.Tensor,
    missing: torch.Tensor,
    ring: int,
) -> None:
    """Count queries that are not those of the positions that are to score.

    Args:
        tags: ``[num_layers, num_places]``, int32, from ``store_queries``.
        spans: the requests; read are ``query_start``, ``ring_start`` and
            ``num_queries``.
        first: ``[num_requests]``, int32: position of the oldest query of each.
        missing: ``[1]``, int32: the count is added to it.
        ring: places of each request.
    """
    _missing_kernel[(spans.num_requests, len(tags))](
        tags, spans.query_start, spans.ring_start, spans.num_queries, first, missing,
        ring, tags.stride(0), BLOCK=triton.next_power_of_2(ring),
    )  # fmt: skip
