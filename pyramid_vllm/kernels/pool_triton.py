"""``pooled`` for all requests of a step, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.requests_triton import Spans, kernel, program_of


@kernel
def _pool_kernel(  # type: ignore[no-untyped-def]
    scores, out, num_columns, num_recent, offset, num_requests, layer_stride,
    head_stride, HEADS: tl.constexpr, KERNEL: tl.constexpr, MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    layer, request, head = program_of(num_requests, HEADS)
    columns = tl.load(num_columns + request)
    context = columns - tl.load(num_recent + request)
    base = layer * layer_stride + head * head_stride + tl.load(offset + request)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(scores + base + t, mask=t < columns, other=0.0)
    pooled = tl.zeros([BLOCK], tl.float32)
    if MAX:
        pooled += float("-inf")
    for i in range(KERNEL):
        near = t + i - KERNEL // 2
        inside = (near >= 0) & (near < context)
        if MAX:
            value = tl.load(scores + base + near, mask=inside, other=float("-inf"))
            pooled = tl.maximum(pooled, value)
        else:
            pooled += tl.load(scores + base + near, mask=inside, other=0.0)
    if not MAX:
        pooled = pooled / KERNEL
    tl.store(out + base + t, tl.where(t < context, pooled, own), mask=t < columns)


def pool_scores(
    scores: torch.Tensor,
    out: torch.Tensor,
    spans: Spans,
    kind: str,
    kernel: int,
    *,
    max_columns: int,
) -> None:
    """``pooled`` for some requests in some layers.

    Args:
        scores: ``[num_layers, num_groups, num_scores]``, float32, contiguous.
        out: the same shape and strides, another tensor.
        spans: the requests; read are ``num_columns``, ``num_recent`` and
            ``offset``; the newest tokens have scores.
        kind: ``avg`` or ``max``.
        kernel: tokens that are pooled, an odd number.
        max_columns: most tokens of a request that have scores.
    """
    layers, heads = scores.shape[:2]
    block = 1024
    grid = (layers * spans.num_requests * heads, triton.cdiv(max_columns, block))
    _pool_kernel[grid](
        scores, out, spans.num_columns, spans.num_recent, spans.offset,
        spans.num_requests, *scores.stride()[:2], HEADS=heads, KERNEL=kernel,
        MAX=kind == "max", BLOCK=block,
    )  # fmt: skip
