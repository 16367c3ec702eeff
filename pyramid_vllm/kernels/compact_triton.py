"""``compact`` for all requests of a step, in one launch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.requests_triton import (
    INTERPRETED,
    PagedLayers,
    Spans,
    as_bytes,
    kernel,
    layer_pointer,
    program_of,
)
from pyramid_vllm.kernels.scratch import WAITING_BYTES, Scratch


@kernel
def _compact_kernel(  # type: ignore[no-untyped-def]
    keys, values, like, table, targets, kept, row, num_held, num_kept, column, offset,
    num_requests, sb, sh, st, sd, table_stride, targets_stride, kept_layer,
    kept_group, moved_scratch, num_slots, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, ELSEWHERE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Move one head's keys or values of a request forward, oldest first.

    With ``PART`` 0 a page that is written holds none of the request's tokens, or is its
    own in that place. A token never moves back, so that what a block writes over was
    moved by an earlier one or lies in the block, which is read first. Else part 1 moves
    all tokens to ``moved_scratch``, and part 2 to their pages.
    """
    layer, request, head = program_of(num_requests, HEADS)
    count = tl.load(num_kept + request)
    if count >= tl.load(num_held + request):
        return
    pages = layer_pointer(keys, layer, like, ALIGNMENT)
    if tl.program_id(1) == 1:
        pages = layer_pointer(values, layer, like, ALIGNMENT)
    request_table = table + tl.load(row + request).to(tl.int64) * table_stride
    skipped = tl.load(column + request)
    begin = tl.load(offset + request) - skipped
    sources = kept + layer * kept_layer + (head % GROUPS) * kept_group + begin
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    between = ((layer * 2 + tl.program_id(1)) * HEADS + head) * num_slots + begin
    for start in range(skipped, count, BLOCK_T):  # what is in shared pages stays
        target = start + tl.arange(0, BLOCK_T)
        inside = target < count
        mask = inside[:, None] & (dims[None, :] < D)
        waits = moved_scratch + ((between + target) * D)[:, None] + dims[None, :]
        if PART == 2:
            moved = tl.load(waits, mask=mask)
        else:
            source = tl.load(sources + target, mask=inside, other=0)
            block = tl.load(request_table + source // PAGE, mask=inside, other=0)
            at = pages + block.to(tl.int64) * sb + head * sh + (source % PAGE) * st
            moved = tl.load(at[:, None] + dims[None, :] * sd, mask=mask)
        tl.debug_barrier()
        if PART == 1:
            tl.store(waits, moved, mask=mask)
        else:
            block = tl.load(request_table + target // PAGE, mask=inside, other=0)
            if ELSEWHERE:
                own = targets + request.to(tl.int64) * targets_stride + target // PAGE
                other = tl.load(own, mask=inside, other=0)
                block = tl.where(other >= 0, other, block)
            to = pages + block.to(tl.int64) * sb + head * sh + (target % PAGE) * st
            tl.store(to[:, None] + dims[None, :] * sd, moved, mask=mask)


def compact_pages(
    keys: PagedLayers,
    values: PagedLayers,
    block_table: torch.Tensor,
    spans: Spans,
    kept: torch.Tensor,
    targets: torch.Tensor | None = None,
    *,
    scratch: Scratch | None = None,
) -> None:
    """Gather kept tokens into the slots after the shared ones.

    Safe for overlapping ranges. Bytes are moved as they are: quantized caches stay
    exact.

    Args:
        keys: some layers' keys.
        values: their values; shape, dtype and strides of the keys.
        block_table: ``[num_rows, max_blocks]``, int32, rows contiguous.
        spans: the requests; read are ``row``, ``num_held``, ``num_kept``,
            ``column`` (tokens before it stay where they are) and ``offset``.
        kept: ``[num_layers, 1 or num_kv_heads, num_scores]``, int32, from ``select``.
        targets: ``[num_requests, max_blocks]``, int32, rows contiguous: pages to write,
            by their place in the request's block table; -1, or None: the table's own.
        scratch: needed where pages hold tokens that are read after they are written:
            those of some layers at a time then wait there; None: no page does.

    Raises:
        ValueError: keys and values are laid out differently.
    """
    if keys.like.stride() != values.like.stride():
        raise ValueError(
            f"keys of strides {keys.like.stride()}: valid are those of the values, "
            f"{values.like.stride()}"
        )
    heads, _, head_size = keys.like.shape[1:]
    if scratch is None:
        _launch(keys, values, block_table, spans, kept, targets, None, 0)
        return
    num_slots = kept.shape[2]
    of_layer = 2 * heads * num_slots * head_size
    count = max(1, WAITING_BYTES // (of_layer * as_bytes(keys.like).dtype.itemsize))
    for start in range(0, keys.num_layers, count):
        some = slice(start, start + count)
        key = keys._replace(addresses=keys.addresses[some])
        value = values._replace(addresses=values.addresses[some])
        shape = (key.num_layers, 2, heads, num_slots, head_size)
        waits = scratch.get("moved", shape, as_bytes(keys.like).dtype)
        for part in (1, 2):
            _launch(key, value, block_table, spans, kept[some], targets, waits, part)


def _launch(
    keys: PagedLayers,
    values: PagedLayers,
    block_table: torch.Tensor,
    spans: Spans,
    kept: torch.Tensor,
    targets: torch.Tensor | None,
    scratch: torch.Tensor | None,
    part: int,
) -> None:
    heads, page, head_size = keys.like.shape[1:]
    like, pages = as_bytes(keys.like), block_table if targets is None else targets
    block_d = triton.next_power_of_2(head_size)
    if not INTERPRETED:
        # Parts of a head's vector multiply the programs that few requests have.
        block_d = min(block_d, 64)
    grid = (
        keys.num_layers * spans.num_requests * heads,
        2,
        triton.cdiv(head_size, block_d),
    )
    _compact_kernel[grid](
        keys.addresses, values.addresses, like, block_table, pages, kept, spans.row,
        spans.num_held, spans.num_kept, spans.column, spans.offset,
        spans.num_requests, *like.stride(), block_table.stride(0), pages.stride(0),
        *kept.stride()[:2], like if scratch is None else scratch, kept.shape[2],
        HEADS=heads, GROUPS=kept.shape[1], D=head_size, PAGE=page,
        ALIGNMENT=math.gcd(keys.alignment, values.alignment), BLOCK_D=block_d,
        BLOCK_T=1024 if INTERPRETED else 128, ELSEWHERE=targets is not None, PART=part,
    )  # fmt: skip
