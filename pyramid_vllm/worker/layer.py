"""What one attention layer does with a step's prompt windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pyramid_vllm.kernels.spans import Spans
from pyramid_vllm.policy import Queries
from pyramid_vllm.worker.cache_group import CacheGroup, LayerConstants, over_heads

if TYPE_CHECKING:
    from pyramid_vllm.worker.state import WorkerState
    from pyramid_vllm.worker.windows import WindowBatch

_NUM_COLUMNS = Spans._fields.index("num_columns")


class TieredLayer:
    """Scores after its attention; the last of its group selects and compacts for all.

    Args:
        constants: of the layer.
        group: the layers that share its block table.
        place: its place among them.
        state: what the worker's layers share.
        query_scale: returns the factor of quantized queries: one float32.
    """

    def __init__(
        self,
        constants: LayerConstants,
        group: CacheGroup,
        place: int,
        state: WorkerState,
        query_scale: Callable[[], torch.Tensor],
    ) -> None:
        self.index, self.tier = constants.index, group.tier
        self.cache = constants.cache
        self._prunes_next = constants.prunes_next
        self.group, self._place, self._state = group, place, state
        self._keys = group.keys.layer(place)
        self._query_scale = query_scale
        device = query_scale().device
        self._no_scale = torch.ones(1, dtype=torch.float32, device=device)
        self._only = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def is_active(self) -> bool:
        """Whether this step needs the layer's queries; captured graphs copy them."""
        step = self._state.step
        return step.generated is not None or (
            step.plan is not None and step.plan.num_prompt_tokens > 0
        )

    def after_attention(self, query: torch.Tensor) -> None:
        """Handle every window of the step.

        Args:
            query: ``[num_rows, num_heads, head_size]``, this layer's queries, and rows
                that pad them.
        """
        step, state = self._state.step, self._state
        scale = self._no_scale
        if query.dtype.itemsize == 1:
            scale = self._query_scale().view(1)
        if step.generated is not None:
            step.generated.write(self.index, self.tier, query, scale)
        if step.plan is None or not step.plan.num_prompt_tokens:
            return
        state.counters.count(self.index, self.tier, self._rows_of(query), step)
        if not step.batches:
            return
        with state.timer.part():
            self._handle_batches(query, scale)
        step.num_layers_done += 1

    def _handle_batches(self, query: torch.Tensor, scale: torch.Tensor) -> None:
        state, group = self._state, self.group
        scores = group.scores(state.step)
        for batch in state.step.batches:
            self._score(batch, query, scale, scores)
        if self._prunes_next and state.step.rows.is_pruned[-1]:
            self._choose_rows(scores[self._place : self._place + 1])
        if self._place + 1 == len(group.layers):
            for batch in state.step.batches:
                group.move(batch, state, scores)

    def _rows_of(self, query: torch.Tensor) -> int:
        """Rows that the layer has computed, without those that pad a graph; rows of a
        pruned tier are never padded."""
        rows = self._state.step.rows
        expected = rows.total_rows[self.tier]
        padded = not rows.is_pruned[self.tier] and len(query) > expected
        return expected if padded else len(query)

    def _score(
        self,
        batch: WindowBatch,
        query: torch.Tensor,
        query_scale: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        tier, config = self.tier, batch.config
        source = self._source(batch, query)
        bounds, spans = batch.bounds[tier], batch.spans[tier]
        moves = bounds.moves
        if self._prunes_next:
            bounds, spans = batch.narrow_bounds[tier], batch.narrow_spans[tier]
            moves |= bounds.moves
        if not (bounds.is_scored if config.needs_queries else moves):
            return
        own = scores[self._place : self._place + 1]
        self._state.step.kernels.score(
            config,
            self.group.attention.layer(self._place, query_scale),
            source[None],
            self._only,
            self._keys,
            self._state.step.batch.pages(self.group.group_id),
            spans,
            own,
            max_queries=bounds.max_queries,
            max_tokens=bounds.max_tokens,
            max_columns=bounds.max_columns,
            scratch=self._state.step.scratch,
        )
        if config.scored_queries is Queries.ALL:
            self._accumulate(batch, own[0])

    def _source(self, batch: WindowBatch, query: torch.Tensor) -> torch.Tensor:
        """``[num_rows, num_heads, head_size]``: where the batch's queries lie; those
        that a later chunk needs are kept."""
        if batch.config.scored_queries is not Queries.WINDOW:
            return query
        queries, parts = self._state.queries, []
        starts = batch.columns.starts[self.tier]
        ends = starts + batch.columns.num_rows[self.tier]
        for window, start, end in zip(batch.windows, starts, ends, strict=True):
            if not window.num_queries or not (window.retain or batch.packed):
                continue
            newest = queries.newest(
                window.req_id, self.index, query[start:end], window.num_queries
            )
            parts.append(newest)
            if window.retain:
                queries.retain(window.req_id, self.index, newest)
        return torch.cat(parts) if batch.packed else query

    def _accumulate(self, batch: WindowBatch, scores: torch.Tensor) -> None:
        """Add the scores of earlier chunks, and keep them for later ones."""
        accumulated = self._state.accumulated
        starts = batch.offsets[self.tier]
        ends = starts + batch.on_host[0, self.tier, _NUM_COLUMNS]
        for window, start, end in zip(batch.windows, starts, ends, strict=True):
            own = scores[:, start:end]
            own.copy_(accumulated.add(window.req_id, self.index, own))
            if window.retain:
                accumulated.retain(window.req_id, self.index, own.clone())

    def _choose_rows(self, scores: torch.Tensor) -> None:
        """Choose the rows of the next tier by this layer's scores."""
        step, tier, state = self._state.step, self.tier, self._state
        assert state.pruner is not None
        kept = step.scratch.get("rows", (scores.shape[-1],), torch.int32)
        for batch in step.batches:
            bounds, config = batch.narrow_bounds[tier], batch.config
            if not bounds.moves:
                continue
            final = self.group.final_scores(
                scores, batch, batch.narrow_spans[tier], bounds, step
            )
            layer = over_heads(final, not config.scoring.is_same_for_all_heads)
            rows = batch.row_spans[tier]
            step.kernels.select(
                layer, kept[None, None], rows, max_tokens=bounds.max_tokens
            )
        state.pruner.set_rows(tier, kept)
        if state.record is not None:
            state.record.prune(tier, step, kept)
