"""From scores to moves, in all layers that share a block table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from pyramid_vllm.kernels.compact_triton import compact_pages, gather_into_pages
from pyramid_vllm.kernels.score_triton import pool_scores
from pyramid_vllm.kernels.select_triton import select
from pyramid_vllm.worker.device.scorers import RECENCY
from pyramid_vllm.worker.layer import over_heads

if TYPE_CHECKING:
    from pyramid_vllm.kernels.requests_triton import Spans
    from pyramid_vllm.policy import PolicyConfig
    from pyramid_vllm.worker.device.layer import DeviceGroup
    from pyramid_vllm.worker.device.step import DeviceStep
    from pyramid_vllm.worker.device.windows import TierSize, WindowBatch


def final_scores(
    scores: torch.Tensor,
    config: PolicyConfig,
    spans: Spans,
    size: TierSize,
    step: DeviceStep,
) -> torch.Tensor:
    """Scores as they are compared: pooled, or by age.

    Args:
        scores: ``[num_layers, num_kv_heads, num_scores]``, float32.
        config: the policy.
        spans: the requests.
        size: bounds of the launch.
        step: the current step.

    Returns:
        ``[num_layers, 1 or num_kv_heads, num_scores]``
    """
    if config.scorer == RECENCY:
        newer = torch.arange(
            scores.shape[-1], dtype=torch.float32, device=scores.device
        )
        return newer.expand(scores.shape[0], 1, -1)
    if not config.pools:
        return scores
    pooled = step.scratch.get("pooled", tuple(scores.shape), torch.float32)
    pool_scores(
        scores,
        pooled,
        spans,
        config.pooling,
        config.pool_kernel,
        max_tokens=size.max_tokens,
    )
    return pooled


def move_group(
    group: DeviceGroup, batch: WindowBatch, step: DeviceStep, scores: torch.Tensor
) -> None:
    """Select and compact in all layers of a group.

    Args:
        group: the layers.
        batch: windows of one policy.
        step: the current step.
        scores: ``[num_layers, num_kv_heads, num_scores]``, float32.
    """
    config = batch.config
    size, spans = batch.sizes[group.tier], batch.spans[group.tier]
    if not size.moves:
        return
    chosen = final_scores(scores, config, spans, size, step)
    if config.selection == "layer":
        chosen = over_heads(chosen, not config.scoring.is_same_for_all_heads)
    kept = step.scratch.get("kept", tuple(chosen.shape), torch.int32)
    select(chosen, kept, spans, max_tokens=size.max_tokens)
    table = step.batch.pages(group.group_id)
    shared = [rows.window.pages is not None for rows in batch.windows]
    if any(shared):
        _gather_shared(group, batch, kept, table)
        spans = _without(spans, shared)
    if not all(shared):
        compact_pages(group.keys, group.values, table, spans, kept)


def _without(spans: Spans, left_out: Sequence[bool]) -> Spans:
    """The same spans; nothing moves in some of them."""
    stays = async_tensor_h2d(list(left_out), spans.row.device, torch.bool)
    return spans._replace(num_kept=torch.where(stays, spans.num_held, spans.num_kept))


def _gather_shared(
    group: DeviceGroup, batch: WindowBatch, kept: torch.Tensor, table: torch.Tensor
) -> None:
    """Gather what requests keep of shared pages into pages of their own."""
    for column, rows in enumerate(batch.windows):
        pages, num_kept = rows.window.pages, rows.window.num_kept
        if pages is None or num_kept is None:
            continue
        count, start = num_kept[group.tier], int(batch.offsets[group.tier, column])
        if count == rows.num_held(group.tier):
            continue
        target = pages[group.group_id]
        for place, layer in enumerate(group.layers):
            key, value = layer.cache
            block_ids = table[rows.row]
            gather_into_pages(
                key,
                value,
                block_ids,
                block_ids
                if target is None
                else async_tensor_h2d(list(target), table.device, torch.int32),
                kept[place, :, start : start + count],
            )
