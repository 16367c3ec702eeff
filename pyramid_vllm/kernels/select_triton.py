"""``select_tokens`` for all requests of a step, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyramid_vllm.kernels.requests_triton import Spans, kernel, program_of

#: Tokens that one program looks at together, of short prompts and of others: few
#: sizes, because a kernel is compiled for each.
_BLOCKS = (1024, 4096)


@triton.jit
def _ordered(scores, at, place, inside):  # type: ignore[no-untyped-def]
    """Scores as unsigned integers of the same order; zero where there is none."""
    value = tl.load(scores + at + place, mask=inside, other=0.0)
    # Minus zero is zero: they are equal as scores.
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    negative = (bits >> 31) == 1
    key = tl.where(negative, ~bits, bits | 0x80000000)
    return tl.where(inside, key, 0)


@triton.jit
def _threshold(  # type: ignore[no-untyped-def]
    scores, at, count, wanted, SINGLE: tl.constexpr, BLOCK: tl.constexpr
):
    """The lowest score of the best ``wanted``, and how many are better than it."""
    place = tl.arange(0, BLOCK)
    keys = _ordered(scores, at, place, place < count)
    found = tl.zeros([], tl.uint32)
    bit = tl.full([], 1 << 31, tl.uint32)
    for _ in range(32):
        candidate = found | bit
        if SINGLE:
            enough = tl.sum((keys >= candidate).to(tl.int32), 0)
        else:
            enough = 0
            for start in range(0, count, BLOCK):
                part = _ordered(scores, at, start + place, start + place < count)
                enough += tl.sum((part >= candidate).to(tl.int32), 0)
        found = tl.where(enough >= wanted, candidate, found)
        bit = bit >> 1
    better = 0
    equal = 0
    for start in range(0, count, BLOCK):
        inside = start + place < count
        part = _ordered(scores, at, start + place, inside)
        better += tl.sum(((part > found) & inside).to(tl.int32), 0)
        equal += tl.sum(((part == found) & inside).to(tl.int32), 0)
    return found, better, equal


@kernel
def _select_kernel(  # type: ignore[no-untyped-def]
    scores, out, num_held, num_kept, num_first, num_recent, column, offset,
    num_requests, score_layer, score_group, out_layer, out_group,
    GROUPS: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, request, group = program_of(num_requests, GROUPS)
    held = tl.load(num_held + request)
    kept = tl.load(num_kept + request)
    if kept >= held:
        return
    first = tl.load(num_first + request)
    count = held - first - tl.load(num_recent + request)
    wanted = kept - (held - count)
    begin = tl.load(offset + request)
    at = layer * score_layer + group * score_group + begin
    skipped = tl.load(column + request)
    at += first - skipped
    to = out + layer * out_layer + group * out_group + begin
    threshold, better, equal = _threshold(scores, at, count, wanted, SINGLE, BLOCK)
    # Of equal scores the newest stay.
    dropped = equal - (wanted - better)
    place = tl.arange(0, BLOCK)
    num_out = 0
    num_equal = 0
    for start in range(0, held, BLOCK):
        token = start + place
        middle = (token >= first) & (token < first + count)
        key = _ordered(scores, at, token - first, middle)
        ties = (middle & (key == threshold)).to(tl.int32)
        rank = num_equal + tl.cumsum(ties, 0)
        best = (key > threshold) | ((ties == 1) & (rank > dropped))
        stays = tl.where(middle, best, token < held).to(tl.int32)
        slot = num_out + tl.cumsum(stays, 0) - 1
        # All tokens before the first one that has a score stay: they are not written.
        tl.store(to + slot - skipped, token, mask=(stays == 1) & (slot >= skipped))
        num_out += tl.sum(stays, 0)
        num_equal += tl.sum(ties, 0)


def select(
    scores: torch.Tensor, out: torch.Tensor, spans: Spans, *, max_tokens: int
) -> None:
    """Choose the tokens that stay, of some requests in some layers.

    Exactly ``select_tokens``: of equal scores the newer token stays, and what is
    chosen is written in ascending order. The lowest score that stays is found bit by
    bit, without sorting. Requests that keep all they hold are passed over.

    Args:
        scores: ``[num_layers, num_groups, num_scores]``, float32, last dimension
            contiguous; a group is a layer or a KV head.
        out: ``[num_layers, num_groups, num_scores]``, int32, last dimension
            contiguous: a request's kept tokens from ``column`` on, from its
            ``offset`` on; those before ``column`` stay.
        spans: the requests; read are ``num_held``, ``num_kept``, ``num_first``,
            ``num_recent``, ``column`` and ``offset``.
        max_tokens: most tokens held of a request.
    """
    layers, groups = scores.shape[:2]
    block = _BLOCKS[max_tokens > _BLOCKS[0]]
    _select_kernel[(layers * spans.num_requests * groups,)](
        scores, out, spans.num_held, spans.num_kept, spans.num_first, spans.num_recent,
        spans.column, spans.offset, spans.num_requests, *scores.stride()[:2],
        *out.stride()[:2], GROUPS=groups, SINGLE=max_tokens <= block, BLOCK=block,
    )  # fmt: skip
