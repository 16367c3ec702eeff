"""Compile kernels before the first request needs them."""

from __future__ import annotations

import torch
from vllm.utils.math_utils import cdiv

from pyramid_vllm.kernels.spans import Spans
from pyramid_vllm.policy import PolicyConfig
from pyramid_vllm.worker.cache_group import CacheGroup
from pyramid_vllm.worker.step import TierStep

#: Lengths whose kernels differ: of queries, and of tokens to choose from.
_QUERIES = (1, 16, 256)
_TOKENS = tuple(16 << i for i in range(10))


def compile_kernels(
    group: CacheGroup,
    config: PolicyConfig,
    step: TierStep,
    num_heads: int,
    dtype: torch.dtype,
) -> int:
    """Launch every kernel of a policy on a dummy request of one token.

    Args:
        group: layers of this worker; what one group compiles, all use, because layers
            of all groups have one shape.
        config: the engine's policy.
        step: the current step; none runs.
        num_heads: query heads of a layer.
        dtype: of the model.

    Returns:
        How many launches there were.
    """
    device, kernels = step.device, step.kernels
    spans = _one_token(device)
    heads, page, size = group.keys.like.shape[1:]
    longest = max(_TOKENS)
    table = torch.zeros(1, cdiv(longest, page), dtype=torch.int32, device=device)
    query = torch.zeros(1, 1, num_heads, size, dtype=dtype, device=device)
    shape = (len(group.layers), heads, longest)
    scores = torch.zeros(shape, dtype=torch.float32, device=device)
    lengths = _QUERIES if config.needs_queries else (1,)
    for num_queries in lengths:
        kernels.score(
            config,
            group.attention.layer(0, group.attention.query_scale),
            query,
            torch.zeros(1, dtype=torch.int64, device=device),
            group.keys.layer(0),
            table,
            spans,
            scores[:1],
            max_queries=num_queries,
            max_tokens=1,
            max_columns=1,
        )
    return len(lengths) + _choose(group, config, step, table, spans, scores)


def _one_token(device: torch.device) -> Spans:
    """A request whose one token stays, in the null page."""
    fields = {"num_held": 1, "num_kept": 1, "num_columns": 1}
    columns = [[fields.get(name, 0)] for name in Spans._fields]
    return Spans.of(torch.tensor(columns, dtype=torch.int32, device=device))


def _choose(
    group: CacheGroup,
    config: PolicyConfig,
    step: TierStep,
    table: torch.Tensor,
    spans: Spans,
    scores: torch.Tensor,
) -> int:
    """Pool, select and compact; how many launches there were."""
    kernels = step.kernels
    if config.pools:
        pooled = torch.zeros_like(scores)
        kind, width = config.pooling, config.pool_kernel
        kernels.pool(scores, pooled, spans, kind, width, max_columns=1)
    chosen = scores[:, :1] if config.selection == "layer" else scores
    kept = torch.zeros(chosen.shape, dtype=torch.int32, device=scores.device)
    for tokens in _TOKENS:
        kernels.select(chosen, kept, spans, max_tokens=tokens)
    for targets, scratch in ((None, None), (table, None), (table, step.scratch)):
        kernels.compact(
            group.keys, group.values, table, spans, kept, targets, scratch=scratch
        )
    return config.pools + len(_TOKENS) + 4
