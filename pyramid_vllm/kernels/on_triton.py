"""The kernel set of GPUs: one launch for all requests of a step.

The functions are those of ``KernelSet``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pyramid_vllm.kernels.compact_triton import compact_pages
from pyramid_vllm.kernels.lengths_triton import tier_lengths
from pyramid_vllm.kernels.norms_triton import score_key_diffs, score_key_norms
from pyramid_vllm.kernels.pool_triton import pool_scores as pool
from pyramid_vllm.kernels.prune_triton import gather_rows, row_indices, scatter_rows
from pyramid_vllm.kernels.queries_triton import count_missing, store_queries
from pyramid_vllm.kernels.score_triton import (
    ACCUMULATED,
    ATTENTION,
    VOTES,
)
from pyramid_vllm.kernels.score_triton import score as score_queries
from pyramid_vllm.kernels.scratch import Scratch
from pyramid_vllm.kernels.select_triton import select
from pyramid_vllm.kernels.spans import Attention, BlockTables, PagedLayers, Spans
from pyramid_vllm.policy import KVPolicyError, PolicyConfig

__all__ = [
    "IS_COMPILED",
    "check_policies",
    "compact",
    "count_missing",
    "gather_rows",
    "lengths",
    "pool",
    "row_indices",
    "scatter_rows",
    "score",
    "select",
    "store_queries",
]

IS_COMPILED = True
#: Scorers that read queries, by what ``score_queries`` calls them.
KINDS = {"attention": ATTENTION, "accumulated": ACCUMULATED, "votes": VOTES}
KEY_NORM = "key_norm"
KEY_DIFF = "key_diff"
RECENCY = "recency"
SCORERS = frozenset({*KINDS, KEY_NORM, KEY_DIFF, RECENCY})


def check_policies(policies: Iterable[PolicyConfig]) -> None:
    """Refuse scorers that no kernel computes."""
    for policy in policies:
        if policy.scorer not in SCORERS:
            raise KVPolicyError(
                f"kv_policy does not support scorer='{policy.scorer}' on this device: "
                f"kernels compute {', '.join(sorted(SCORERS))}; others run on the CPU "
                "back end"
            )


def lengths(
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    evicted: torch.Tensor,
    tier_of_group: torch.Tensor,
    tables: BlockTables,
    tier_lens: torch.Tensor,
    slots: torch.Tensor | Sequence[torch.Tensor],
    *,
    block_size: int,
    num_rows: torch.Tensor | None = None,
    row_starts: torch.Tensor | None = None,
) -> None:
    """See ``tier_lengths``."""
    assert isinstance(slots, torch.Tensor)
    tier_lengths(
        seq_lens,
        query_starts,
        evicted,
        tier_of_group,
        tables.addresses,
        tables.strides,
        tier_lens,
        slots,
        block_size=block_size,
        num_rows=num_rows,
        row_starts=row_starts,
    )


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
    scratch: Scratch | None = None,
) -> None:
    """Score by the kernel of ``config``'s scorer."""
    if config.scorer == RECENCY:
        # Any numbers that rise with the place will do.
        torch.arange(out.shape[-1], dtype=out.dtype, device=out.device, out=out[0, 0])
        out[1:, 0] = out[0, 0]
        return
    if config.scorer == KEY_NORM:
        score_key_norms(keys, block_table, spans, out, max_tokens=max_tokens)
        return
    if config.scorer == KEY_DIFF:
        score_key_diffs(keys, block_table, spans, out)
        return
    score_queries(
        query,
        query_layers,
        keys,
        block_table,
        spans,
        out,
        max_queries=max_queries,
        max_tokens=max_tokens,
        max_columns=max_columns,
        scale=attention.scale,
        query_scale=attention.query_scale,
        key_scales=attention.key_scales,
        distance_weight=config.distance_weight,
        kind=KINDS[config.scorer],
        logits_soft_cap=attention.logits_soft_cap,
        sink_logits=_sink_logits(attention),
        ring=ring,
        scratch=scratch,
    )


def _sink_logits(attention: Attention) -> torch.Tensor | None:
    """``[num_layers, num_heads]``"""
    sinks = attention.sink_logits
    if sinks is None:
        return None
    return sinks[0][None] if len(sinks) == 1 else torch.stack(tuple(sinks))


def compact(
    keys: PagedLayers,
    values: PagedLayers,
    block_table: torch.Tensor,
    spans: Spans,
    kept: torch.Tensor,
    targets: torch.Tensor | None = None,
    *,
    scratch: Scratch | None = None,
) -> None:
    """Move what stays in all layers, in one launch where the order allows it."""
    compact_pages(keys, values, block_table, spans, kept, targets, scratch=scratch)
