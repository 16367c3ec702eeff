"""Compile kernels before the first request needs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pyramid_vllm.kernels.spans import BlockTables, Spans
from pyramid_vllm.policy import NONE, PolicyConfig
from pyramid_vllm.worker.cache_group import CacheGroup

if TYPE_CHECKING:
    from pyramid_vllm.worker.state import WorkerState

#: Rows of a block of queries, and tokens to choose from, by which kernels differ.
_ROWS = (16, 32, 64)
_TOKENS = (1, 1025, 4097)


class QueryKinds(NamedTuple):
    """What kernels know of a model, besides its cache."""

    num_heads: int
    """Query heads of a layer, on this worker."""
    hidden_size: int
    dtype: torch.dtype
    """Of the model."""
    query_dtypes: frozenset[torch.dtype]
    """Of the queries that attention gets: they may be quantized."""


def compile_kernels(
    groups: Sequence[CacheGroup], state: WorkerState, kinds: QueryKinds
) -> int:
    """Launch every variant of every kernel that a valid request can reach.

    The requests of these launches are dummies of one token, or of none.

    Args:
        groups: layers of this worker; what one compiles, all that are alike use.
        state: of the worker; no step runs.
        kinds: of the model.

    Returns:
        How many launches there were.
    """
    warm_up = _WarmUp(state, kinds)
    warm_up.lengths()
    if state.pruner is not None:
        warm_up.rows()
    alike = {_kind_of(group): group for group in groups}
    for group in alike.values():
        if state.step.generated is not None:
            warm_up.generated(group, state.step.generated.num_queries)
        warm_up.score(group)
        warm_up.choose(group)
    return warm_up.num_launches


def _kind_of(group: CacheGroup) -> tuple[Any, ...]:
    """What the kernels of a group's layers are compiled for."""
    keys, attention = group.keys, group.attention
    sinks = attention.sink_logits
    return (
        keys.like.shape[1:],
        keys.like.stride(),
        keys.like.dtype,
        keys.alignment,
        group.values.alignment,
        bool(attention.logits_soft_cap),
        None if sinks is None else sinks[0].dtype,
    )


class _WarmUp:
    def __init__(self, state: WorkerState, kinds: QueryKinds) -> None:
        self._step, self._kinds = state.step, kinds
        self._kernels, self._device = state.step.kernels, state.step.device
        self._prunes = state.pruner is not None
        policies = state.policies.values()
        self._policies = [config for config in policies if config.name != NONE]
        # A request whose one token stays, in the null page.
        fields = {"num_held": 1, "num_kept": 1, "num_columns": 1}
        columns = [[fields.get(name, 0)] for name in Spans._fields]
        on_host = torch.tensor(columns, dtype=torch.int32)
        self._spans = Spans.of(on_host.to(self._device))
        self.num_launches = 0

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def lengths(self) -> None:
        """Lengths and slots, of a cache group that is no tier's."""
        zero, rows = self._zeros(1), self._zeros(1, 2)
        tables = BlockTables(
            (), self._zeros(1, dtype=torch.uint64), self._zeros(1, dtype=torch.int64)
        )
        for pruned in {False, self._prunes}:
            self._kernels.lengths(
                zero,
                self._zeros(2),
                rows,
                zero - 1,
                tables,
                rows.clone(),
                self._zeros(1, 1, dtype=torch.int64),
                block_size=self._step.block_size,
                num_rows=rows if pruned else None,
                row_starts=rows if pruned else None,
            )
            self.num_launches += 1

    def rows(self) -> None:
        """Rows of a pruned tier; there is one."""
        zero, kinds = self._zeros(1), self._kinds
        starts = torch.arange(2, dtype=torch.int32, device=self._device)
        self._kernels.row_indices(starts, starts, zero - 1, zero, zero, self._zeros(1))
        rows = self._zeros(1, kinds.hidden_size, dtype=kinds.dtype)
        rows = self._kernels.gather_rows(rows, zero)
        self._kernels.scatter_rows(rows, zero, 1)
        self.num_launches += 3

    def generated(self, group: CacheGroup, ring: int) -> None:
        """Queries of generated tokens, of which none is kept."""
        kinds, size = self._kinds, group.keys.like.shape[-1]
        zero, shape = self._zeros(1), (1, kinds.num_heads, size)
        scale = torch.ones(1, device=self._device)
        for dtype in kinds.query_dtypes:
            query = self._zeros(*shape, dtype=dtype)
            kept = self._zeros(*shape, dtype=kinds.dtype)
            self._kernels.store_queries(query, zero - 1, zero, scale, kept, zero)
            self.num_launches += 1
        tags = self._zeros(1, ring)
        self._kernels.count_missing(tags, self._spans, zero, zero, ring)
        self.num_launches += 1

    def _scored(self, group: CacheGroup) -> Iterable[tuple[str, torch.dtype, int]]:
        """Scorers, dtypes of queries and numbers of them that differ in kernels."""
        kinds, per_head = self._kinds, self._kinds.num_heads // group.keys.like.shape[1]
        in_prompt = [max(1, rows // per_head) for rows in _ROWS]
        for config in self._policies:
            for num_queries in in_prompt if config.needs_queries else (1,):
                for dtype in kinds.query_dtypes:
                    yield config.scorer, dtype, num_queries
            if config.generation and config.needs_queries:
                yield config.scorer, kinds.dtype, config.gen_queries

    def score(self, group: CacheGroup) -> None:
        """Scores of a prompt in one layer, and of generated tokens."""
        by_scorer = {config.scorer: config for config in self._policies}
        heads, _, size = group.keys.like.shape[1:]
        scores = self._zeros(1, heads, 1, dtype=torch.float32)
        for scorer, dtype, num_queries in set(self._scored(group)):
            self._kernels.score(
                by_scorer[scorer],
                group.attention.layer(0, group.attention.query_scale),
                self._zeros(1, 1, self._kinds.num_heads, size, dtype=dtype),
                self._zeros(1, dtype=torch.int64),
                group.keys.layer(0),
                self._zeros(1, 1),
                self._spans,
                scores,
                max_queries=num_queries,
                max_tokens=1,
                max_columns=1,
            )
            self.num_launches += 1

    def choose(self, group: CacheGroup) -> None:
        """Pool, select and compact."""
        heads = group.keys.like.shape[1]
        shape = (len(group.layers), heads, 1)
        scores = self._zeros(*shape, dtype=torch.float32)
        for kind, width in {
            (c.pooling, c.pool_kernel) for c in self._policies if c.pools
        }:
            pooled = torch.zeros_like(scores)
            self._kernels.pool(scores, pooled, self._spans, kind, width, max_columns=1)
            self.num_launches += 1
        moved = {1 if _is_by_layer(config) else heads for config in self._policies}
        for num_groups in moved | ({1} if self._prunes else set()):
            chosen = scores[:, :num_groups]
            kept = torch.zeros(chosen.shape, dtype=torch.int32, device=self._device)
            for tokens in _TOKENS:
                self._kernels.select(chosen, kept, self._spans, max_tokens=tokens)
            self.num_launches += len(_TOKENS)
            if num_groups in moved:
                self._compact(group, kept)

    def _compact(self, group: CacheGroup, kept: torch.Tensor) -> None:
        """In place, into other pages, and into pages that are still to be read."""
        table, scratch = self._zeros(1, 1), self._step.scratch
        for targets, waits in ((None, None), (table, None), (table, scratch)):
            self._kernels.compact(
                group.keys,
                group.values,
                table,
                self._spans,
                kept,
                targets,
                scratch=waits,
            )
            self.num_launches += 1


def _is_by_layer(config: PolicyConfig) -> bool:
    """Whether all KV heads of a layer keep the same tokens."""
    return config.selection == "layer" or config.scoring.is_same_for_all_heads
