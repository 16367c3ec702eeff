"""Compressed generation on a GPU: groups of tokens outside the recent window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from pyramid_vllm.kernels.compact_triton import compact_pages
from pyramid_vllm.kernels.requests_triton import Spans
from pyramid_vllm.kernels.score_triton import score
from pyramid_vllm.kernels.select_triton import select
from pyramid_vllm.plan import GroupWindow, StepPlan
from pyramid_vllm.policy import PolicyConfig
from pyramid_vllm.worker.device.layer import DeviceGroup
from pyramid_vllm.worker.device.queries import DeviceGroupQueries
from pyramid_vllm.worker.device.step import DeviceStep
from pyramid_vllm.worker.layer import over_heads


def compress_groups(
    plan: StepPlan,
    policies: Mapping[str, PolicyConfig],
    cache_groups: Sequence[DeviceGroup],
    step: DeviceStep,
) -> None:
    """Score and compact the plan's groups of generated tokens, after the forward pass.

    The queries were copied by the pass itself, so that it can be a captured graph.

    Args:
        plan: the step's plan.
        policies: by the names that the plan uses.
        cache_groups: this worker's layers.
        step: the current step.
    """
    for name in {group.policy for group in plan.groups}:
        windows = [group for group in plan.groups if group.policy == name]
        for cache_group in cache_groups:
            _compress(windows, policies[name], cache_group, step)


def _compress(
    windows: Sequence[GroupWindow],
    config: PolicyConfig,
    group: DeviceGroup,
    step: DeviceStep,
) -> None:
    """The same for requests of one policy, in the layers of one cache group."""
    on_host = _columns(windows, group.tier, step)
    sent = async_tensor_h2d(on_host, device=step.device)
    spans, first = Spans.of(sent[:-1]), sent[-1]
    num_held = on_host[Spans._fields.index("num_held")]
    scores = _scores(windows, config, group, step, spans, first, num_held)
    kept = step.scratch.get("kept", tuple(scores.shape), torch.int32)
    longest = int(num_held.max())
    select(scores, kept, spans, max_tokens=longest)
    table = step.batch.pages(group.group_id)
    compact_pages(group.keys, group.values, table, spans, kept)


def _columns(
    windows: Sequence[GroupWindow], tier: int, step: DeviceStep
) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """``[num_fields + 1, num_windows]``: the spans, and each oldest query's position.

    All tokens before the group stay, all behind it stay: it alone is chosen from.
    """
    queries, offset, columns = step.group_queries, 0, []
    for window in windows:
        start, size = window.starts[tier], window.group
        kept = window.num_kept[tier]
        held = kept + size - window.group_kept[tier]
        oldest = window.num_tokens - window.num_queries
        slot = ring = 0
        if queries is not None:
            ring = oldest % queries.num_queries
            slot = queries.slot(window.req_id) * queries.num_queries
        row = step.batch.row_of[window.req_id]
        columns.append(
            (row, slot, ring, window.num_queries, held, kept, start,
             held - start - size, start, size, offset, oldest)
        )  # fmt: skip
        offset += held
    return np.array(columns, dtype=np.int32).T.copy()


def _scores(
    windows: Sequence[GroupWindow],
    config: PolicyConfig,
    group: DeviceGroup,
    step: DeviceStep,
    spans: Spans,
    first: torch.Tensor,
    num_held: np.ndarray[tuple[int, ...], np.dtype[np.int32]],
) -> torch.Tensor:
    """``[num_layers, 1 or num_kv_heads, num_scores]``, float32"""
    num_layers, size = len(group.layers), int(num_held.sum())
    if not config.needs_queries:
        # No query is read: as in the prompt, newer tokens stay.
        newer = torch.arange(size, dtype=torch.float32, device=step.device)
        return newer.expand(num_layers, 1, -1)
    queries = step.group_queries
    assert isinstance(queries, DeviceGroupQueries)
    queries.verify(group.indices, spans, first)
    shape = (num_layers, group.keys.like.shape[1], size)
    scores = step.scratch.get("group scores", shape, torch.float32)
    layer = group.layers[0]
    sinks = [one.sink_logits for one in group.layers if one.sink_logits is not None]
    score(
        queries.buffer,
        group.indices,
        group.keys,
        step.batch.pages(group.group_id),
        spans,
        scores,
        max_queries=queries.num_queries,
        max_tokens=int(num_held.max()),
        max_columns=windows[0].group,
        scale=layer.scale,
        query_scale=layer.no_scale,
        key_scales=group.key_scales,
        distance_weight=config.distance_weight,
        logits_soft_cap=layer.logits_soft_cap,
        sink_logits=torch.stack(sinks) if sinks else None,
        ring=queries.num_queries,
        scratch=step.scratch,
    )
    return over_heads(scores, True) if config.selection == "layer" else scores
