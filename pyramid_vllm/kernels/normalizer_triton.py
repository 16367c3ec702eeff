"""Normalizers of attention, from those of parts of the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.requests_triton import kernel, program_of


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
