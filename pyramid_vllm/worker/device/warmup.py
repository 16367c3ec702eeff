"""Compile kernels before the first request needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.utils.math_utils import cdiv

from pyramid_vllm.kernels.compact_triton import compact_pages
from pyramid_vllm.kernels.requests_triton import Spans
from pyramid_vllm.kernels.score_triton import pool_scores, score, score_key_norms
from pyramid_vllm.kernels.select_triton import select
from pyramid_vllm.policy import PolicyConfig
from pyramid_vllm.worker.device.layer import DeviceGroup
from pyramid_vllm.worker.device.scorers import KEY_NORM, KINDS
from pyramid_vllm.worker.device.step import DeviceStep

#: Lengths whose kernels differ: of queries, and of tokens to choose from.
_QUERIES = (1, 16, 256)
_TOKENS = tuple(16 << i for i in range(10))


def compile_kernels(
    groups: Sequence[DeviceGroup],
    config: PolicyConfig,
    step: DeviceStep,
    num_heads: int,
    dtype: torch.dtype,
) -> int:
    """Launch every kernel of a policy on a request that holds one token of no one.

    Args:
        groups: this worker's layers.
        config: the engine's policy.
        step: the current step; none runs.
        num_heads: query heads of a layer.
        dtype: of the model.

    Returns:
        How many launches there were.
    """
    device = step.device
    # Layers of all groups have one shape: what one compiles, all use.
    group, spans = groups[0], _one_token(device)
    heads, page, size = group.keys.like.shape[1:]
    longest = max(_TOKENS)
    table = torch.zeros(1, cdiv(longest, page), dtype=torch.int32, device=device)
    query = torch.zeros(1, 1, num_heads, size, dtype=dtype, device=device)
    shape = (len(group.layers), heads, longest)
    scores = torch.zeros(shape, dtype=torch.float32, device=device)
    lengths = _QUERIES if config.needs_queries else ()
    for queries in lengths:
        _score(group, config, query, table, spans, scores, queries)
    if config.scorer == KEY_NORM:
        score_key_norms(group.keys, table, spans, scores, max_tokens=1)
    return len(lengths) + _choose(group, config, table, spans, scores)


def _one_token(device: torch.device) -> Spans:
    """A request whose one token stays, in the page that is nobody's."""
    fields = {"num_held": 1, "num_kept": 1, "num_columns": 1}
    columns = [[fields.get(name, 0)] for name in Spans._fields]
    return Spans.of(torch.tensor(columns, dtype=torch.int32, device=device))


def _choose(
    group: DeviceGroup,
    config: PolicyConfig,
    table: torch.Tensor,
    spans: Spans,
    scores: torch.Tensor,
) -> int:
    """Pool, select and compact; how many launches there were."""
    if config.pools:
        pooled = torch.zeros_like(scores)
        kind, kernel = config.pooling, config.pool_kernel
        pool_scores(scores, pooled, spans, kind, kernel, max_tokens=1)
    chosen = scores[:, :1] if config.selection == "layer" else scores
    kept = torch.zeros(chosen.shape, dtype=torch.int32, device=scores.device)
    for tokens in _TOKENS:
        select(chosen, kept, spans, max_tokens=tokens)
    compact_pages(group.keys, group.values, table, spans, kept)
    return config.pools + len(_TOKENS) + 1


def _score(
    group: DeviceGroup,
    config: PolicyConfig,
    query: torch.Tensor,
    table: torch.Tensor,
    spans: Spans,
    scores: torch.Tensor,
    max_queries: int,
) -> None:
    layer = group.layers[0]
    sinks = layer.sink_logits
    score(
        query,
        torch.zeros(1, dtype=torch.int64, device=query.device),
        group.keys._replace(addresses=group.keys.addresses[:1]),
        table,
        spans,
        scores[:1],
        max_queries=max_queries,
        max_tokens=1,
        max_columns=1,
        scale=layer.scale,
        query_scale=layer.no_scale,
        key_scales=group.key_scales[:1],
        distance_weight=config.distance_weight,
        kind=KINDS[config.scorer],
        logits_soft_cap=layer.logits_soft_cap,
        sink_logits=None if sinks is None else sinks[None],
    )
