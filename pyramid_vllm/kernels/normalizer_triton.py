"""Normalizers of attention: of parts of the keys, then of all."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.requests_triton import (
    INTERPRETED,
    PagedLayers,
    as_float,
    kernel,
    layer_pointer,
    load_keys,
    program_of,
)
from pyramid_vllm.kernels.scratch import MAX_NORMALIZERS, Scratch


@triton.jit
def load_queries(  # type: ignore[no-untyped-def]
    query, start, ring_start, ring, places, heads, dims, inside, sr, sh, sd,
    D: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """``[rows, dims]`` of the queries that are ``places`` newer than the oldest one."""
    row = start + (ring_start + places) % ring
    at = query + row.to(tl.int64) * sr + heads * sh
    mask = inside[:, None] & (dims[None, :] < D)
    queries = tl.load(at[:, None] + dims[None, :] * sd, mask=mask, other=0)
    return as_float(queries, KIND)


@triton.jit
def logits_of(q, k, scale, soft_cap, DTYPE: tl.constexpr, SOFT_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    logits = tl.dot(q.to(DTYPE), k.to(DTYPE), input_precision="tf32x3") * scale
    if SOFT_CAP:
        # tanh, from what Triton has everywhere; beyond 20 it is 1.
        capped = tl.minimum(logits / soft_cap, 20.0)
        logits = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * capped) + 1.0))
    return logits


@triton.jit
def scale_of(scales, layer):  # type: ignore[no-untyped-def]
    """A layer's factor of its quantized keys, read from its address."""
    return tl.load(tl.load(scales + layer).to(tl.pointer_type(tl.float32)))


@kernel
def _normalizer_kernel(  # type: ignore[no-untyped-def]
    query, addresses, like, table, row, query_start, ring_start, num_queries, num_held,
    layers, query_scale, key_scales, num_requests, ring, scale, soft_cap,
    ql, qr, qh, qd, sb, sh, st, sd, table_stride, out, out_request, out_head, out_split,
    split,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, SOFT_CAP: tl.constexpr, Q_KIND: tl.constexpr,
    K_KIND: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Log of the sum of exponentials, over the tokens of one split of the keys."""
    layer, request, head = program_of(num_requests, HEADS)
    count = tl.load(num_queries + request)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(1) * BLOCK_M >= count * GROUP:
        return
    held = tl.load(num_held + request)
    place, dims = m // GROUP, tl.arange(0, BLOCK_D)
    inside = place < count
    pages = layer_pointer(addresses, layer, like, ALIGNMENT)
    scale = scale * tl.load(query_scale) * scale_of(key_scales, layer)
    q = load_queries(
        query + tl.load(layers + layer) * ql, tl.load(query_start + request),
        tl.load(ring_start + request), ring, place, head * GROUP + m % GROUP, dims,
        inside, qr, qh, qd, D, Q_KIND,
    )  # fmt: skip
    request_table = table + tl.load(row + request).to(tl.int64) * table_stride
    seen = held - count + place + 1
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Not a constant: kernels would be compiled for each of its values.
    split = tl.multiple_of(split, 512)
    first = tl.program_id(2) * split
    for start in range(first, tl.minimum(first + split, held), BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        k = load_keys(
            pages, request_table, tokens, held, head, dims, sb, sh, st, sd, PAGE, D,
            K_KIND,
        )  # fmt: skip
        logits = logits_of(q, k, scale, soft_cap, DTYPE, SOFT_CAP)
        logits = tl.where(tokens[None, :] < seen[:, None], logits, float("-inf"))
        highest = tl.maximum(largest, tl.max(logits, 1))
        # Rows that see no token yet must not take infinity from infinity.
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(largest - finite)
        total += tl.sum(tl.exp(logits - finite[:, None]), 1)
        largest = highest
    result = largest + tl.log(tl.where(total > 0.0, total, 1.0))
    at = out + (layer * num_requests + request) * out_request + head * out_head
    tl.store(at + tl.program_id(2) * out_split + m, result, mask=inside)


@kernel
def _combine_kernel(  # type: ignore[no-untyped-def]
    partial, sinks, out, num_requests, num_splits, rows, part_batch, part_head,
    part_split, out_batch, out_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, request, head = program_of(num_requests, HEADS)
    batch = layer * num_requests + request
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = m < rows
    at = partial + batch * part_batch + head * part_head
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if SINKS:
        # Another share of each head's attention, which is no token's.
        share = sinks + (layer * HEADS + head) * GROUP + m % GROUP
        largest = tl.load(share).to(tl.float32)
        total += 1.0
    for split in range(num_splits):
        part = tl.load(at + split * part_split + m, mask=inside, other=float("-inf"))
        highest = tl.maximum(largest, part)
        # A part without a visible token must not take infinity from infinity.
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(largest - finite) + tl.exp(part - finite)
        largest = highest
    result = largest + tl.log(tl.where(total > 0.0, total, 1.0))
    tl.store(out + batch * out_batch + head * out_head + m, result, mask=inside)


def combine(
    partial: torch.Tensor,
    out: torch.Tensor,
    num_requests: int,
    group: int,
    sink_logits: torch.Tensor | None,
) -> None:
    """Log of the sum of exponentials of several parts, and of the sinks.

    Args:
        partial: ``[num_layers * num_requests, num_kv_heads, num_splits, num_rows]``,
            float32: of each part; minus infinity where it has none.
        out: ``[num_layers * num_requests, num_kv_heads, num_rows]``, float32.
        num_requests: requests.
        group: query heads of a KV head; row ``m`` belongs to the ``m % group``-th.
        sink_logits: ``[num_layers, num_heads]``, contiguous; None without sinks.
    """
    batch, heads, splits, rows = partial.shape
    block = 256
    _combine_kernel[(batch * heads, triton.cdiv(rows, block))](
        partial, partial if sink_logits is None else sink_logits, out, num_requests,
        splits, rows, *partial.stride()[:3], *out.stride()[:2], HEADS=heads,
        GROUP=group, SINKS=sink_logits is not None, BLOCK=block,
    )  # fmt: skip


def max_requests(query: torch.Tensor, keys: PagedLayers, max_queries: int) -> int:
    """Requests of a launch whose normalizers fit into bounded memory, at least one."""
    of_one = keys.num_layers * query.shape[2] * max_queries
    return max(1, MAX_NORMALIZERS // of_one)


def normalizers(
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    max_queries: int,
    max_tokens: int,
    sink_logits: torch.Tensor | None,
    scratch: Scratch,
) -> torch.Tensor:
    """Log of the sum of exponentials, of each query.

    Returns:
        ``[num_layers * num_requests, num_kv_heads, max_queries * group]``
    """
    addresses, row = arguments[1], arguments[4]
    heads, group = constants["HEADS"], constants["GROUP"]
    batch, rows = len(addresses) * len(row), max_queries * group
    split = _split(max_tokens, rows, batch * heads * rows)
    shape = (batch, heads, triton.cdiv(max_tokens, split), rows)
    partial = scratch.get("parts of normalizers", shape, torch.float32)
    blocks = triton.cdiv(rows, constants["BLOCK_M"])
    _normalizer_kernel[(batch * heads, blocks, shape[2])](
        *arguments, partial, *partial.stride()[:3], split, **constants
    )
    out = scratch.get("normalizers", (batch, heads, rows), torch.float32)
    combine(partial, out, len(row), group, sink_logits)
    return out


def _split(max_tokens: int, rows: int, num_normalizers: int) -> int:
    """Tokens of a split: they give few requests enough programs, in bounded memory."""
    if INTERPRETED:
        return 1 << 30
    least = 512 if max_tokens * rows < 1 << 24 else 4096
    most = max(1, MAX_NORMALIZERS // num_normalizers)
    fits = -(-max_tokens // most)
    return least * -(-fits // least)
