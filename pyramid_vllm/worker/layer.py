"""What one attention layer does with a step's prompt windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.utils.math_utils import cdiv

from pyramid_vllm.kernels import compact_in_place, select_tokens
from pyramid_vllm.policy import PolicyConfig
from pyramid_vllm.worker.queries import QueryWindows
from pyramid_vllm.worker.scorers import SCORERS
from pyramid_vllm.worker.step import TierStep, WindowRows

if TYPE_CHECKING:
    from pyramid_vllm.attention.layout import KVViews


class TieredLayer:
    """Scores, selects and compacts in one layer, after its attention.

    Args:
        index: the layer's place among the tiered ones, from 0.
        tier: its tier.
        scale: factor of its attention logits.
        logits_soft_cap: its soft cap, 0 for none.
        config: the policy.
        step: the worker's current step.
        queries: the worker's retained queries.
    """

    def __init__(
        self,
        index: int,
        tier: int,
        scale: float,
        logits_soft_cap: float,
        config: PolicyConfig,
        step: TierStep,
        queries: QueryWindows,
    ) -> None:
        self.index = index
        self.tier = tier
        self._scale = scale
        self._logits_soft_cap = logits_soft_cap
        self._config = config
        self._step = step
        self._queries = queries
        self._scorer = SCORERS[config.scorer]

    @property
    def compacts(self) -> bool:
        """Whether this step has windows."""
        return self._step.has_windows

    def after_attention(
        self, query: torch.Tensor, cache: KVViews, block_table: torch.Tensor
    ) -> None:
        """Handle every window of the step.

        Args:
            query: ``[num_batch_tokens, num_heads, head_size]``, this layer's queries.
            cache: the layer's paged keys and values.
            block_table: ``[num_reqs, max_blocks]``, int32, the tier's pages.
        """
        for rows in self._step.windows():
            window = rows.window
            newest = None
            if window.num_queries:
                newest = self._queries.newest(
                    window.req_id,
                    self.index,
                    query[rows.query_start : rows.query_end],
                    window.num_queries,
                )
                if window.retain:
                    self._queries.retain(window.req_id, self.index, newest)
            if window.num_kept is not None:
                self._compact(rows, newest, cache, block_table[rows.row])
        self._step.num_layers_done += 1

    def _compact(
        self,
        rows: WindowRows,
        newest: torch.Tensor | None,
        cache: KVViews,
        block_table: torch.Tensor,
    ) -> None:
        window = rows.window
        assert window.num_kept is not None
        num_held = window.num_tokens - rows.num_evicted[self.tier]
        num_kept = window.num_kept[self.tier]
        if num_kept == num_held:
            return
        block_size = cache.key.shape[2]
        block_ids = block_table[: cdiv(num_held, block_size)].long()
        # [blocks, heads, block_size, size] -> [tokens, heads, size]
        key = cache.key[block_ids].transpose(1, 2).flatten(0, 1)[:num_held]
        scores = self._scores(newest, key)
        kept = select_tokens(scores, num_kept, self._config.sinks, window.num_recent)
        compact_in_place(cache.key, cache.value, block_ids, kept)

    def _scores(self, newest: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
        scores = self._scorer(
            newest, key, self._scale, self._logits_soft_cap, self._config
        )
        if self._config.selection == "head":
            return scores
        scores = scores.mean(dim=0, keepdim=True)
        num_ranks = get_tensor_model_parallel_world_size()
        if num_ranks > 1:
            # One rank's heads alone would choose other tokens than all heads do.
            scores = tensor_model_parallel_all_reduce(scores) / num_ranks
        return scores
