"""The kernel set of CPUs: torch, one request after the other.

The functions are those of ``KernelSet``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from pyramid_vllm.kernels.compact import compact_requests
from pyramid_vllm.kernels.score import pooled
from pyramid_vllm.kernels.select import keep_best
from pyramid_vllm.kernels.spans import Attention, BlockTables, PagedLayers, Spans
from pyramid_vllm.policy import PolicyConfig
from pyramid_vllm.scorers import ScoreInputs, scored

IS_COMPILED = False


def check_policies(policies: Iterable[PolicyConfig]) -> None:
    """Any scorer will do."""


class _Span:
    """One request of a launch; fields as in ``Spans``."""

    row: int
    query_start: int
    ring_start: int
    num_queries: int
    num_held: int
    num_kept: int
    num_first: int
    num_recent: int
    column: int
    num_columns: int
    offset: int

    def __init__(self, values: Sequence[int]) -> None:
        self.__dict__.update(zip(Spans._fields, values, strict=True))


def _each(spans: Spans) -> Iterator[_Span]:
    return map(_Span, zip(*(field.tolist() for field in spans), strict=True))


def lengths(
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    evicted: torch.Tensor,
    tier_of_group: torch.Tensor,
    tables: BlockTables,
    tier_lens: torch.Tensor,
    slots: Sequence[torch.Tensor],
    *,
    block_size: int,
    num_rows: torch.Tensor | None = None,
    row_starts: torch.Tensor | None = None,
) -> None:
    """Lengths of all tiers; slots of those that differ from stock vLLM's."""
    count = len(seq_lens)
    scheduled = query_starts[1:] - query_starts[:-1]
    held = seq_lens - evicted
    differs = (evicted != 0).any(dim=1)
    if num_rows is not None:
        held -= scheduled - num_rows
        differs |= (num_rows != scheduled).any(dim=1)
    tier_lens[:, :count] = held
    tier_lens[:, count:] = 0
    changed = differs.tolist()
    places: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for group, tier in enumerate(tier_of_group.tolist()):
        if tier < 0 or not changed[tier]:
            continue
        if tier not in places:
            rows = scheduled if num_rows is None else num_rows[tier]
            starts = query_starts if row_starts is None else row_starts[tier]
            places[tier] = _places(held[tier], rows, starts)
        row, place = places[tier]
        block = tables.tensors[group][row, place // block_size].long()
        slots[group][: len(row)] = block * block_size + place % block_size
        # Rows that are pruned are written nowhere.
        slots[group][len(row) : int(query_starts[count])] = -1


def _places(
    held: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request of each of a tier's rows, and its token's place in the pages."""
    row = torch.repeat_interleave(rows)
    # The place of a request's first row, less that row's place in the batch.
    shift = held - starts[1:]
    return row, shift[row] + torch.arange(len(row))


def score(
    config: PolicyConfig,
    attention: Attention,
    query: torch.Tensor,
    query_layers: torch.Tensor,
    keys: PagedLayers,
    block_table: torch.Tensor,
    spans: Spans,
    out: torch.Tensor,
    *,
    max_queries: int,
    max_tokens: int,
    max_columns: int,
    ring: int | None = None,
    scratch: Any = None,
) -> None:
    """Score cached tokens of some requests in some layers by a policy's scorer.

    Args:
        config: the policy.
        attention: of the layers.
        query: ``[num_query_layers, num_rows, num_heads, head_size]``, any strides.
        query_layers: ``[num_layers]``, int64: which of these is each layer's.
        keys: the layers' keys.
        block_table: ``[num_rows, max_blocks]``, int32.
        spans: the requests; those without queries are left out where the scorer reads
            queries.
        out: ``[num_layers, num_kv_heads, num_scores]``, float32; a scorer that is the
            same for all heads writes the first group alone.
        max_queries: most queries of a request; next: most tokens held, and scored.
        ring: rows of each request's ring of queries; None: queries lie in order.
        scratch: memory that calls share.
    """
    requests = list(_each(spans))
    for layer, of_query in enumerate(query_layers.tolist()):
        sinks = attention.sink_logits
        of_layer = attention._replace(sink_logits=sinks and sinks[layer : layer + 1])
        for span in requests:
            newest = None
            if config.needs_queries:
                if not span.num_queries:
                    continue
                newest = _newest(query[of_query], span, ring)
            key = _held(keys.caches[layer], block_table, span)
            columns = slice(span.column, span.column + span.num_columns)
            if not config.needs_queries:  # keys are compared with what is scored
                key, columns = key[columns], slice(None)
            found = scored(_inputs(of_layer, newest, key, span), config)
            to = slice(span.offset, span.offset + span.num_columns)
            out[layer, : len(found), to] = found[:, columns]


def _inputs(
    attention: Attention, query: torch.Tensor | None, key: torch.Tensor, span: _Span
) -> ScoreInputs:
    sinks = attention.sink_logits
    return ScoreInputs(
        query,
        key,
        attention.scale,
        attention.logits_soft_cap,
        None if sinks is None else sinks[0],
        span.num_recent,
    )


def _held(cache: torch.Tensor, block_table: torch.Tensor, span: _Span) -> torch.Tensor:
    """``[num_held, num_kv_heads, head_size]``: what a request holds, oldest first."""
    blocks = block_table[span.row, : -(-span.num_held // cache.shape[2])].long()
    # [blocks, heads, page, size] -> [tokens, heads, size]
    return cache[blocks].transpose(1, 2).flatten(0, 1)[: span.num_held]


def _newest(query: torch.Tensor, span: _Span, ring: int | None) -> torch.Tensor:
    """``[num_queries, num_heads, head_size]``, of one layer."""
    if ring is None:
        return query[span.query_start : span.query_start + span.num_queries]
    places = (span.ring_start + torch.arange(span.num_queries)) % ring
    return query[span.query_start + places]


def pool(
    scores: torch.Tensor,
    out: torch.Tensor,
    spans: Spans,
    kind: str,
    kernel: int,
    *,
    max_columns: int,
) -> None:
    """Pool the scores of each request, in all layers at once."""
    for span in _each(spans):
        own = slice(span.offset, span.offset + span.num_columns)
        part = scores[..., own]
        result = pooled(part.flatten(0, 1), span.num_recent, kind, kernel)
        out[..., own] = result.view_as(part)


def select(
    scores: torch.Tensor, out: torch.Tensor, spans: Spans, *, max_tokens: int
) -> None:
    """Choose what stays of each request, in all layers at once."""
    for span in _each(spans):
        if span.num_kept >= span.num_held:
            continue
        start = span.offset + span.num_first - span.column
        end = span.offset + span.num_held - span.num_recent - span.column
        middle = scores[..., start:end]
        kept = keep_best(
            middle.flatten(0, 1), span.num_kept, span.num_first, span.num_held
        )
        to = slice(span.offset, span.offset + span.num_kept - span.column)
        out[..., to] = kept[:, span.column :].view(*middle.shape[:-1], -1)


def compact(
    keys: PagedLayers,
    values: PagedLayers,
    block_table: torch.Tensor,
    spans: Spans,
    kept: torch.Tensor,
    targets: torch.Tensor | None = None,
    *,
    scratch: Any = None,
) -> None:
    """Move what stays: arguments as of ``compact_triton.compact_pages``. A layer's
    tokens are all read before the first is written, so that no order matters."""
    compact_requests(keys, values, block_table, spans, kept, targets)


def row_indices(
    starts: torch.Tensor,
    next_starts: torch.Tensor,
    window_of: torch.Tensor,
    kept: torch.Tensor,
    offset: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Rows that the next tier computes."""
    counts = next_starts[1:] - next_starts[:-1]
    shift = torch.repeat_interleave((starts - next_starts)[:-1], counts)
    out[: len(shift)] = torch.arange(len(shift)) + shift
    for request, window in enumerate(window_of.tolist()):
        if window >= 0:
            begin, end = next_starts[request : request + 2].tolist()
            first = int(offset[window])
            rows = kept[first : first + end - begin]
            out[begin:end] = starts[request] + rows


def gather_rows(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``source[index]``"""
    return source[index]


def scatter_rows(
    source: torch.Tensor, index: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Rows in their places among zeros."""
    out = source.new_zeros((num_rows, *source.shape[1:]))
    out[index] = source
    return out


def store_queries(
    query: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    tags: torch.Tensor,
) -> None:
    """Copy the queries of some rows to their places in a buffer."""
    target, positions = target[: len(query)], positions[: len(query)]
    kept = target >= 0
    if not kept.all():
        query, target, positions = query[kept], target[kept], positions[kept]
    target = target.long()
    out.index_copy_(0, target, query)
    tags.index_copy_(0, target, positions)


def count_missing(
    tags: torch.Tensor,
    spans: Spans,
    first: torch.Tensor,
    missing: torch.Tensor,
    ring: int,
) -> None:
    """Count queries that are not those of the positions that are to score."""
    place = torch.arange(ring)
    rows = spans.query_start[:, None] + (spans.ring_start[:, None] + place) % ring
    wrong = tags[:, rows] != first[:, None] + place
    missing += (wrong & (place < spans.num_queries[:, None])).sum().int()
