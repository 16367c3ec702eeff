"""What one attention layer does with a step's prompt windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.utils.math_utils import cdiv

from pyramid_vllm.kernels import compact, select_tokens
from pyramid_vllm.policy import PolicyConfig, Queries
from pyramid_vllm.worker.query_slots import GroupQueries
from pyramid_vllm.worker.scorers import ScoreInputs, layer_scores

if TYPE_CHECKING:
    from pyramid_vllm.attention.layout import KVViews
    from pyramid_vllm.plan import PromptWindow
    from pyramid_vllm.worker.shared import WorkerState
    from pyramid_vllm.worker.step import WindowRows


def over_heads(scores: torch.Tensor, by_rank: bool) -> torch.Tensor:
    """Mean scores of a layer: over heads, and over tensor-parallel ranks.

    Args:
        scores: ``[..., num_kv_heads, num_tokens]``, float32.
        by_rank: whether each rank has scores of its own heads.

    Returns:
        ``[..., 1, num_tokens]``
    """
    mean = scores.mean(dim=-2, keepdim=True)
    num_ranks = get_tensor_model_parallel_world_size()
    if num_ranks > 1 and by_rank:
        # One rank's heads alone would choose other tokens than all heads do.
        mean = tensor_model_parallel_all_reduce(mean) / num_ranks
    return mean


@dataclass(frozen=True)
class LayerConstants:
    """What one attention layer is, whatever runs its part of the policy."""

    index: int
    """Its place among the tiered layers, from 0."""
    tier: int
    group_id: int
    """KV cache group whose pages it has; a tier may have several."""
    prunes_next: bool
    """Whether it is the last layer before another tier, whose rows it chooses."""
    scale: float
    """Factor of its attention logits."""
    logits_soft_cap: float
    """Its soft cap, 0 for none."""
    sink_logits: torch.Tensor | None
    """``[num_heads]``, of its attention sinks; None if it has none."""
    cache: KVViews
    """Its paged keys and values."""


class TieredLayer:
    """Scores, selects, prunes and compacts in one layer, after its attention.

    Args:
        constants: of the layer.
        state: what the worker's layers share.
    """

    def __init__(self, constants: LayerConstants, state: WorkerState) -> None:
        self.index = constants.index
        self.tier = constants.tier
        self._group_id = constants.group_id
        self.scale = constants.scale
        self.logits_soft_cap = constants.logits_soft_cap
        self.sink_logits = constants.sink_logits
        self.cache = constants.cache
        self._prunes_next = constants.prunes_next
        self._state = state

    @property
    def is_active(self) -> bool:
        """Whether this step needs the layer's queries."""
        plan = self._state.step.plan
        return plan is not None and (
            plan.num_prompt_tokens > 0 or self._state.group_queries is not None
        )

    def after_attention(
        self, query: torch.Tensor, block_table: torch.Tensor | None
    ) -> None:
        """Handle every window of the step.

        Args:
            query: ``[num_rows, num_heads, head_size]``, this layer's queries.
            block_table: ``[num_reqs, max_blocks]``, int32, the tier's pages.
        """
        assert block_table is not None
        state = self._state
        state.counters.count(self.index, self.tier, len(query), state.step)
        if state.group_queries is not None:
            assert isinstance(state.group_queries, GroupQueries)
            state.group_queries.write(self.index, self.tier, query, state.step.rows)
        if not state.step.rows.windows:
            return
        with state.timer.part():
            self._handle_windows(query, block_table)
        state.step.num_layers_done += 1

    def _handle_windows(self, query: torch.Tensor, block_table: torch.Tensor) -> None:
        state = self._state
        prunes = self._prunes_next and state.step.rows.is_pruned[-1]
        if prunes:
            assert state.pruner is not None
            state.pruner.begin_tier(self.tier + 1, state.step.rows)
        for rows in state.step.rows.windows:
            config = state.policies[rows.window.policy]
            newest = self._newest(rows, query, config)
            self._evict(rows, newest, block_table[rows.row], prunes, config)

    def _newest(
        self, rows: WindowRows, query: torch.Tensor, config: PolicyConfig
    ) -> torch.Tensor | None:
        """The window's queries, kept where a later chunk needs them."""
        window = rows.window
        if not window.num_queries:
            return None
        chunk = query[rows.query_starts[self.tier] : rows.query_ends[self.tier]]
        if config.scored_queries is Queries.ALL:
            return chunk
        queries = self._state.queries
        newest = queries.newest(window.req_id, self.index, chunk, window.num_queries)
        if window.retain:
            queries.retain(window.req_id, self.index, newest)
        return newest

    def _evict(
        self,
        rows: WindowRows,
        newest: torch.Tensor | None,
        block_table: torch.Tensor,
        prunes: bool,
        config: PolicyConfig,
    ) -> None:
        window, tier, cache = rows.window, self.tier, self.cache
        num_held = rows.num_held(tier)
        num_kept = num_held if window.num_kept is None else window.num_kept[tier]
        narrows = prunes and rows.num_rows(tier + 1) < rows.num_rows(tier)
        adds_up = config.scored_queries is Queries.ALL and window.retain
        if num_kept == num_held and not narrows and not adds_up:
            return
        block_size = cache.key.shape[2]
        block_ids = block_table[: cdiv(num_held, block_size)].long()
        # [blocks, heads, block_size, size] -> [tokens, heads, size]
        key = cache.key[block_ids].transpose(1, 2).flatten(0, 1)[:num_held]
        scores = self._scores(window, newest, key, config)
        if adds_up:
            self._state.accumulated.retain(window.req_id, self.index, scores)
        layer = None
        if narrows or config.selection == "layer":
            layer = over_heads(scores, not config.scoring.is_same_for_all_heads)
        if narrows:
            assert layer is not None
            self._narrow(rows, self._kept_rows(rows, layer, config))
        if num_kept < num_held:
            groups = scores if config.selection == "head" else layer
            assert groups is not None
            kept = select_tokens(groups, num_kept, config.sinks, window.num_recent)
            pages = None if window.pages is None else window.pages[self._group_id]
            target = block_ids if pages is None else torch.tensor(pages)
            compact(cache.key, cache.value, block_ids, target, kept)
            if self._state.record is not None:
                self._state.record.evict(window.req_id, self.index, kept)

    def _narrow(self, rows: WindowRows, kept: torch.Tensor) -> None:
        """Leave the next tier some rows of a request."""
        state = self._state
        assert state.pruner is not None
        state.pruner.keep(rows, self.tier, kept)
        if state.record is not None:
            state.record.prune(rows.window.req_id, self.tier + 1, kept)

    def _scores(
        self,
        window: PromptWindow,
        newest: torch.Tensor | None,
        key: torch.Tensor,
        config: PolicyConfig,
    ) -> torch.Tensor:
        inputs = ScoreInputs(
            newest,
            key,
            self.scale,
            self.logits_soft_cap,
            self.sink_logits,
            window.num_recent,
        )
        scores = layer_scores(inputs, config)
        if config.scored_queries is Queries.ALL:
            return self._state.accumulated.add(window.req_id, self.index, scores)
        return scores

    def _kept_rows(
        self, rows: WindowRows, scores: torch.Tensor, config: PolicyConfig
    ) -> torch.Tensor:
        """Rows of the chunk that the next tier computes: ``[num_rows]``, ascending."""
        num_rows = rows.num_rows(self.tier)
        before = rows.window.num_tokens - rows.num_scheduled
        return select_tokens(
            scores[:, -num_rows:],
            rows.num_rows(self.tier + 1),
            max(0, config.sinks - before),
            min(rows.num_scheduled, rows.window.num_recent),
        )[0]
