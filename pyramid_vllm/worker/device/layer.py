"""What one attention layer does with a step's prompt windows, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from pyramid_vllm.kernels.compact_triton import compact_pages, gather_into_pages
from pyramid_vllm.kernels.requests_triton import PagedLayers
from pyramid_vllm.kernels.score_triton import (
    ACCUMULATED,
    ATTENTION,
    VOTES,
    pool_scores,
    score,
    score_key_norms,
)
from pyramid_vllm.kernels.select_triton import select
from pyramid_vllm.policy import PolicyConfig, Queries
from pyramid_vllm.worker.device.pruner import DevicePruner
from pyramid_vllm.worker.device.step import DeviceStep
from pyramid_vllm.worker.device.windows import TierSize, WindowBatch
from pyramid_vllm.worker.layer import LayerConstants, over_heads

if TYPE_CHECKING:
    from pyramid_vllm.kernels.requests_triton import Spans
    from pyramid_vllm.worker.shared import WorkerState

KINDS = {"attention": ATTENTION, "accumulated": ACCUMULATED, "votes": VOTES}


@dataclass
class DeviceGroup:
    """Layers of one tier that share a block table: compacted by the same launches."""

    group_id: int
    tier: int
    layers: list[DeviceLayer]
    keys: PagedLayers
    values: PagedLayers
    key_scales: torch.Tensor
    """``[num_layers]``, int64: addresses of the factors of quantized keys."""
    indices: torch.Tensor
    """``[num_layers]``, int64: the layers' places among all tiered ones."""


class DeviceLayer:
    """Scores after its attention; the last of its group selects and compacts for all.

    Args:
        constants: of the layer.
        group: the layers that share its block table.
        place: its place among them.
        state: what the worker's layers share.
        query_scale: ``[1]``, float32: factor of quantized queries.
    """

    def __init__(
        self,
        constants: LayerConstants,
        group: DeviceGroup,
        place: int,
        state: WorkerState,
        query_scale: torch.Tensor,
    ) -> None:
        self.index, self.tier = constants.index, constants.tier
        self.sink_logits = constants.sink_logits
        self.scale = constants.scale
        self.logits_soft_cap = constants.logits_soft_cap
        self.cache = constants.cache
        self._prunes_next = constants.prunes_next
        self._group, self._place, self._state = group, place, state
        own = slice(place, place + 1)
        self._keys = group.keys._replace(addresses=group.keys.addresses[own])
        self._key_scales = group.key_scales[own]
        self._query_scale = query_scale
        self.no_scale = torch.ones_like(query_scale)
        self._first = torch.zeros(1, dtype=torch.int64, device=query_scale.device)

    @property
    def _step(self) -> DeviceStep:
        step = self._state.step
        assert isinstance(step, DeviceStep)
        return step

    @property
    def is_active(self) -> bool:
        """Whether this step needs the layer's queries; captured graphs copy them."""
        plan = self._state.step.plan
        return self._step.group_queries is not None or (
            plan is not None and plan.num_prompt_tokens > 0
        )

    def after_attention(
        self, query: torch.Tensor, block_table: torch.Tensor | None
    ) -> None:
        """Handle every window of the step.

        Args:
            query: ``[num_rows, num_heads, head_size]``, this layer's queries, and rows
                that pad them.
            block_table: not read: the runner's own is.
        """
        step, state = self._step, self._state
        scale = self._query_scale if query.dtype.itemsize == 1 else self.no_scale
        if step.group_queries is not None:
            step.group_queries.write(self.index, self.tier, query, scale)
        if step.plan is None or not step.plan.num_prompt_tokens:
            return
        state.counters.count(self.index, self.tier, self._rows_of(query), step)
        if not step.batches:
            return
        scores = self._scores_of_group()
        for batch in step.batches:
            self._score(batch, query, scale, scores)
        if self._prunes_next and step.rows.is_pruned[-1]:
            self._choose_rows(scores[self._place : self._place + 1])
        if self._place + 1 == len(self._group.layers):
            for batch in step.batches:
                move_group(self._group, batch.config, batch, step, scores)
        step.num_layers_done += 1

    def _rows_of(self, query: torch.Tensor) -> int:
        """Rows that the layer has computed; graphs pad them, but not pruned ones."""
        expected = self._step.rows.total_rows[self.tier]
        padded = not self._step.rows.is_pruned[self.tier] and len(query) > expected
        return expected if padded else len(query)

    def _scores_of_group(self) -> torch.Tensor:
        """``[num_layers, num_kv_heads, num_scores]``, float32, of the whole group."""
        group, step = self._group, self._step
        shape = (len(group.layers), group.keys.like.shape[1])
        size = step.num_scores[self.tier]
        name = f"scores {group.group_id}"
        return step.scratch.get(name, (*shape, size), torch.float32)

    def _score(
        self,
        batch: WindowBatch,
        query: torch.Tensor,
        query_scale: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        source = self._source(batch, query)
        size, spans = batch.sizes[self.tier], batch.spans[self.tier]
        if self._prunes_next:
            size, spans = batch.narrowed[self.tier], batch.narrow_spans[self.tier]
        own = scores[self._place : self._place + 1]
        table = self._state.step.batch.pages(self._group.group_id)
        config = batch.config
        if config.scorer == "key_norm" and (size.moves or batch.sizes[self.tier].moves):
            score_key_norms(self._keys, table, spans, own, max_tokens=size.max_tokens)
        if not (config.needs_queries and size.is_scored):
            return
        score(
            source[None],
            self._first,
            self._keys,
            table,
            spans,
            own,
            max_queries=size.max_queries,
            max_tokens=size.max_tokens,
            max_columns=size.max_tokens,
            scale=self.scale,
            query_scale=query_scale,
            key_scales=self._key_scales,
            distance_weight=config.distance_weight,
            kind=KINDS[config.scorer],
            logits_soft_cap=self.logits_soft_cap,
            sink_logits=None if self.sink_logits is None else self.sink_logits[None],
            scratch=self._step.scratch,
        )
        if config.scored_queries is Queries.ALL:
            self._accumulate(batch, own[0])

    def _source(self, batch: WindowBatch, query: torch.Tensor) -> torch.Tensor:
        """``[num_rows, num_heads, head_size]``: where the batch's queries lie; those
        that a later chunk needs are kept."""
        if batch.config.scored_queries is not Queries.WINDOW:
            return query
        queries, parts = self._state.queries, []
        for rows in batch.windows:
            window = rows.window
            if not window.num_queries or not (window.retain or batch.packed):
                continue
            chunk = query[rows.query_starts[self.tier] : rows.query_ends[self.tier]]
            newest = queries.newest(
                window.req_id, self.index, chunk, window.num_queries
            )
            parts.append(newest)
            if window.retain:
                queries.retain(window.req_id, self.index, newest)
        return torch.cat(parts) if batch.packed else query

    def _accumulate(self, batch: WindowBatch, scores: torch.Tensor) -> None:
        """Add the scores of earlier chunks, and keep them for later ones."""
        accumulated = self._state.accumulated
        for column, rows in enumerate(batch.windows):
            start = int(batch.offsets[self.tier, column])
            own = scores[:, start : start + rows.num_held(self.tier)]
            own.copy_(accumulated.add(rows.window.req_id, self.index, own))
            if rows.window.retain:
                accumulated.retain(rows.window.req_id, self.index, own.clone())

    def _choose_rows(self, scores: torch.Tensor) -> None:
        """Choose the rows of the next tier by this layer's scores."""
        step, pruner = self._step, self._state.pruner
        assert isinstance(pruner, DevicePruner)
        kept = step.scratch.get("rows", (scores.shape[-1],), torch.int32)
        for batch in step.batches:
            size = batch.narrowed[self.tier]
            if not size.moves:
                continue
            config, spans = batch.config, batch.narrow_spans[self.tier]
            by_head = final_scores(scores, config, spans, size, step)
            layer = over_heads(by_head, config.scorer != "recency")
            rows = batch.row_spans[self.tier]
            select(layer, kept[None, None], rows, max_tokens=size.max_tokens)
        pruner.set_rows(self.tier, step, kept)


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
    if config.scorer == "recency":
        newer = torch.arange(
            scores.shape[-1], dtype=torch.float32, device=scores.device
        )
        return newer.expand(scores.shape[0], 1, -1)
    if config.pooling == "none" or config.scorer != "attention":
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
    group: DeviceGroup,
    config: PolicyConfig,
    batch: WindowBatch,
    step: DeviceStep,
    scores: torch.Tensor,
) -> None:
    """Select and compact in all layers of a group."""
    size, spans = batch.sizes[group.tier], batch.spans[group.tier]
    if not size.moves:
        return
    chosen = final_scores(scores, config, spans, size, step)
    if config.selection == "layer":
        chosen = over_heads(chosen, config.scorer != "recency")
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
        target = pages[group.tier]
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
