"""Every tier's cache lengths and slots of a step, in one launch."""

from __future__ import annotations

import torch
import triton.language as tl

from pyramid_vllm.kernels.requests_triton import kernel


@kernel
def _lengths_kernel(  # type: ignore[no-untyped-def]
    seq_lens, query_starts, evicted, num_rows, row_starts, tier_of_group, tables,
    table_strides, tier_lens, slots, num_requests, num_slots, page, lens_stride,
    slots_stride, max_requests, PRUNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    request = tl.program_id(1)
    tier = tl.load(tier_of_group + group)
    if tier < 0:
        return
    to = slots + group.to(tl.int64) * slots_stride
    if request >= num_requests:
        # Requests that pad a captured graph hold nothing.
        if request < max_requests:
            tl.store(tier_lens + tier * lens_stride + request, 0)
        if PRUNED & (request == max_requests):
            last = tl.load(row_starts + tier * (num_requests + 1) + num_requests)
            for begin in range(last, num_slots, BLOCK):
                place = begin + tl.arange(0, BLOCK)
                tl.store(to + place, -1, mask=place < num_slots)
        return
    start = tl.load(query_starts + request)
    count = tl.load(query_starts + request + 1) - start
    held = tl.load(seq_lens + request) - tl.load(
        evicted + tier * num_requests + request
    )
    if PRUNED:
        rows = tl.load(num_rows + tier * num_requests + request)
        start = tl.load(row_starts + tier * (num_requests + 1) + request)
        held -= count - rows
        count = rows
    tl.store(tier_lens + tier * lens_stride + request, held)
    table = tl.load(tables + group).to(tl.pointer_type(tl.int32))
    table += request.to(tl.int64) * tl.load(table_strides + group)
    for begin in range(0, count, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        place = held - count + row
        block = tl.load(table + place // page, mask=row < count, other=0).to(tl.int64)
        tl.store(to + start + row, block * page + place % page, mask=row < count)


def tier_lengths(
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    evicted: torch.Tensor,
    tier_of_group: torch.Tensor,
    tables: torch.Tensor,
    table_strides: torch.Tensor,
    tier_lens: torch.Tensor,
    slots: torch.Tensor,
    *,
    block_size: int,
    num_rows: torch.Tensor | None = None,
    row_starts: torch.Tensor | None = None,
) -> None:
    """Write each tier's cache lengths, and the slots of its new tokens, in place.

    A token's place in the pages is its position less the tokens evicted before it, or
    follows from the rows of its tier where rows are pruned. Writing twice is harmless.

    Args:
        seq_lens: ``[num_requests]``, int32, computed tokens with this step's.
        query_starts: ``[num_requests + 1]``, int32, the batch's first rows.
        evicted: ``[num_tiers, num_requests]``, int32.
        tier_of_group: ``[num_groups]``, int32; negative: the group is no tier's.
        tables: ``[num_groups]``, uint64, addresses of int32 block tables whose rows
            are the batch's.
        table_strides: ``[num_groups]``, int64, length of their rows.
        tier_lens: ``[num_tiers, max_requests]``, int32, to write; of requests beyond
            the batch it becomes 0.
        slots: ``[num_groups, max_tokens]``, int64, to write.
        block_size: tokens of a page.
        num_rows: ``[num_tiers, num_requests]``, int32, rows that each tier computes;
            None: those that were scheduled.
        row_starts: ``[num_tiers, num_requests + 1]``, int32, their first rows.
    """
    num_requests, pruned = len(seq_lens), num_rows is not None
    _lengths_kernel[(len(tier_of_group), tier_lens.shape[1] + 1)](
        seq_lens, query_starts, evicted, num_rows if pruned else evicted,
        row_starts if pruned else evicted, tier_of_group, tables, table_strides,
        tier_lens, slots, num_requests, slots.shape[1], block_size,
        tier_lens.stride(0), slots.stride(0), tier_lens.shape[1], PRUNED=pruned,
        BLOCK=256,
    )  # fmt: skip
