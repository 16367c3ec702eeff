"""Rows that a tier computes: their indices, gathered and scattered back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.requests_triton import kernel


@kernel
def _index_kernel(  # type: ignore[no-untyped-def]
    starts, next_starts, window_of, kept, offset, out, BLOCK: tl.constexpr
):
    request = tl.program_id(0)
    source = tl.load(starts + request)
    begin = tl.load(next_starts + request)
    count = tl.load(next_starts + request + 1) - begin
    window = tl.load(window_of + request)
    for i in range(0, count, BLOCK):
        row = i + tl.arange(0, BLOCK)
        inside = row < count
        chosen = row
        if window >= 0:
            at = kept + tl.load(offset + window)
            chosen = tl.load(at + row, mask=inside, other=0)
        tl.store(out + begin + row, source + chosen, mask=inside)


def row_indices(
    starts: torch.Tensor,
    next_starts: torch.Tensor,
    window_of: torch.Tensor,
    kept: torch.Tensor,
    offset: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Indices, among a tier's rows, of those that the next tier computes.

    Args:
        starts: ``[num_requests + 1]``, int32, first rows of the tier.
        next_starts: ``[num_requests + 1]``, int32, first rows of the next tier.
        window_of: ``[num_requests]``, int32: the request's place in ``offset``;
            negative: its first rows stay.
        kept: ``[num_scores]``, int32: rows that stay, from ``select``.
        offset: ``[num_windows]``, int32: where a window's lie in ``kept``.
        out: ``[num_rows]``, int32, to write.
    """
    _index_kernel[(len(window_of),)](
        starts, next_starts, window_of, kept, offset, out, BLOCK=256
    )


@triton.jit
def _move_kernel(  # type: ignore[no-untyped-def]
    source, index, out, width, source_stride, out_stride, SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.load(index + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if SCATTER:
        value = tl.load(source + row.to(tl.int64) * source_stride + column, mask=inside)
        tl.store(out + place * out_stride + column, value, mask=inside)
    else:
        value = tl.load(source + place * source_stride + column, mask=inside)
        tl.store(out + row.to(tl.int64) * out_stride + column, value, mask=inside)


def _move(
    source: torch.Tensor, index: torch.Tensor, out: torch.Tensor, scatter: bool
) -> None:
    if not len(index):
        return
    width = source.shape[1]
    block = min(1024, max(16, triton.next_power_of_2(width)))
    _move_kernel[(len(index), triton.cdiv(width, block))](
        source, index, out, width, source.stride(0), out.stride(0), SCATTER=scatter,
        BLOCK=block,
    )  # fmt: skip


def gather_rows(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor, in order: ``source[index]``.

    Args:
        source: ``[num_rows, width]``, last dimension contiguous.
        index: ``[num_chosen]``, int32.

    Returns:
        ``[num_chosen, width]``
    """
    out = source.new_empty(len(index), source.shape[1])
    _move(source, index, out, scatter=False)
    return out


def scatter_rows(
    source: torch.Tensor, index: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Rows in their places among zeros.

    Args:
        source: ``[num_chosen, width]``, last dimension contiguous.
        index: ``[num_chosen]``, int32, no place twice.
        num_rows: rows of the result.

    Returns:
        ``[num_rows, width]``
    """
    out = source.new_zeros(num_rows, source.shape[1])
    _move(source, index, out, scatter=True)
    return out
