"""What one attention layer does with a step's prompt windows, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pyramid_vllm.kernels.requests_triton import PagedLayers
from pyramid_vllm.kernels.score_triton import score, score_key_norms
from pyramid_vllm.kernels.select_triton import select
from pyramid_vllm.policy import Queries
from pyramid_vllm.worker.device.moves import final_scores, move_group
from pyramid_vllm.worker.device.pruner import DevicePruner
from pyramid_vllm.worker.device.scorers import KEY_NORM, KINDS, check_scorers
from pyramid_vllm.worker.device.step import DeviceStep
from pyramid_vllm.worker.device.windows import WindowBatch
from pyramid_vllm.worker.layer import LayerConstants, over_heads

if TYPE_CHECKING:
    from pyramid_vllm.worker.shared import WorkerState


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
        check_scorers(state.policies.values())
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
        with state.timer.part():
            self._handle_batches(query, scale)
        step.num_layers_done += 1

    def _handle_batches(self, query: torch.Tensor, scale: torch.Tensor) -> None:
        step, scores = self._step, self._scores_of_group()
        for batch in step.batches:
            self._score(batch, query, scale, scores)
        if self._prunes_next and step.rows.is_pruned[-1]:
            self._choose_rows(scores[self._place : self._place + 1])
        if self._place + 1 == len(self._group.layers):
            for batch in step.batches:
                move_group(self._group, batch, step, scores)

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
        if config.scorer == KEY_NORM and (size.moves or batch.sizes[self.tier].moves):
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
            layer = over_heads(by_head, not config.scoring.is_same_for_all_heads)
            rows = batch.row_spans[self.tier]
            select(layer, kept[None, None], rows, max_tokens=size.max_tokens)
        pruner.set_rows(self.tier, step, kept)
