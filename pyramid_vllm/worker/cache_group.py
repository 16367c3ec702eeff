"""Layers of one tier that share a block table: compacted together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.utils.torch_utils import async_tensor_h2d

from pyramid_vllm.kernels.spans import Attention, PagedLayers, Spans

if TYPE_CHECKING:
    from pyramid_vllm.attention.layout import KVViews
    from pyramid_vllm.plan import GeneratedWindow
    from pyramid_vllm.policy import PolicyConfig
    from pyramid_vllm.worker.state import WorkerState
    from pyramid_vllm.worker.step import TierStep
    from pyramid_vllm.worker.windows import Bounds, Ints, WindowBatch

_KEPT, _HELD = (Spans._fields.index(name) for name in ("num_kept", "num_held"))
_OFFSET, _COLUMN = (Spans._fields.index(name) for name in ("offset", "column"))


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
    """What one attention layer is."""

    index: int
    """Its place among the tiered layers, from 0."""
    prunes_next: bool
    """Whether it is the last layer before another tier, whose rows it chooses."""
    cache: KVViews
    """Its paged keys and values."""


class CacheGroup:
    """Selects and compacts in all its layers.

    Args:
        group_id: vLLM's KV cache group, whose pages the layers have; a tier may have
            several.
        tier: of the layers.
        layers: first to last.
        attention: of the layers.
    """

    def __init__(
        self,
        group_id: int,
        tier: int,
        layers: Sequence[LayerConstants],
        attention: Attention,
    ) -> None:
        self.group_id, self.tier, self.layers = group_id, tier, layers
        self.attention = attention
        self.keys = PagedLayers.of([layer.cache.key for layer in layers])
        self.values = PagedLayers.of([layer.cache.value for layer in layers])
        self.indices = torch.tensor(
            [layer.index for layer in layers],
            dtype=torch.int64,
            device=self.keys.like.device,
        )

    def scores(self, step: TierStep) -> torch.Tensor:
        """``[num_layers, num_kv_heads, num_scores]``, float32, of a step's windows."""
        shape = (len(self.layers), self.keys.like.shape[1], step.num_scores[self.tier])
        return step.scratch.get(f"scores {self.group_id}", shape, torch.float32)

    def final_scores(
        self,
        scores: torch.Tensor,
        batch: WindowBatch,
        spans: Spans,
        bounds: Bounds,
        step: TierStep,
    ) -> torch.Tensor:
        """Scores as they are compared: pooled where the policy says so.

        Args:
            scores: ``[num_layers, num_kv_heads, num_scores]``, float32, contiguous.
            batch: windows of one policy.
            spans: the requests.
            bounds: of the launch.
            step: the current step.

        Returns:
            ``[num_layers, 1 or num_kv_heads, num_scores]``
        """
        config = batch.config
        if config.scoring.is_same_for_all_heads:
            scores = scores[:, :1]
        if not config.pools:
            return scores
        pooled = step.scratch.get("pooled", tuple(scores.shape), torch.float32)
        step.kernels.pool(
            scores,
            pooled,
            spans,
            config.pooling,
            config.pool_kernel,
            max_columns=bounds.max_columns,
        )
        return pooled

    def move(
        self, batch: WindowBatch, state: WorkerState, scores: torch.Tensor
    ) -> None:
        """Evict what the windows of one policy evict.

        Args:
            batch: the windows.
            state: of the worker.
            scores: ``[num_layers, num_kv_heads, num_scores]``, float32.
        """
        step, tier = state.step, self.tier
        bounds, spans = batch.bounds[tier], batch.spans[tier]
        if not bounds.moves:
            return
        final = self.final_scores(scores, batch, spans, bounds, step)
        kept = self._selected(final, batch.config, step, spans, bounds.max_tokens)
        table, targets = step.batch.pages(self.group_id), batch.targets
        step.kernels.compact(
            self.keys,
            self.values,
            table,
            spans,
            kept,
            None if targets is None else targets[self.group_id],
            scratch=None if batch.is_ordered else step.scratch,
        )
        if state.record is not None:
            req_ids = [window.req_id for window in batch.windows]
            self._record(state.record.evict, req_ids, batch.on_host[0, tier], kept)

    def _selected(
        self,
        scores: torch.Tensor,
        config: PolicyConfig,
        step: TierStep,
        spans: Spans,
        max_tokens: int,
    ) -> torch.Tensor:
        """``[num_layers, 1 or num_kv_heads, num_scores]``, int32: what stays."""
        if config.selection == "layer":
            by_rank = not config.scoring.is_same_for_all_heads
            scores = over_heads(scores, by_rank)
        kept = step.scratch.get("kept", tuple(scores.shape), torch.int32)
        step.kernels.select(scores, kept, spans, max_tokens=max_tokens)
        return kept

    def _record(
        self,
        note: Callable[[str, int, torch.Tensor], None],
        req_ids: Sequence[str],
        on_host: Ints,
        kept: torch.Tensor,
    ) -> None:
        """Note what stays of each request that evicts tokens."""
        for column, req_id in enumerate(req_ids):
            count, start = int(on_host[_KEPT, column]), int(on_host[_OFFSET, column])
            if count == on_host[_HELD, column]:
                continue
            first = int(on_host[_COLUMN, column])
            for layer, of_layer in zip(self.layers, kept, strict=True):
                chosen = of_layer[:, start : start + count - first].long().cpu()
                before = torch.arange(first).expand(len(chosen), -1)
                note(req_id, layer.index, torch.cat((before, chosen), dim=1))

    def compress(
        self,
        windows: Sequence[GeneratedWindow],
        config: PolicyConfig,
        state: WorkerState,
    ) -> None:
        """Compress generated tokens of requests that have one policy.

        The queries were copied by the forward pass itself, which may be a captured
        graph.

        Args:
            windows: of the plan.
            config: their policy.
            state: of the worker.
        """
        step = state.step
        windows = [w for w in windows if w.num_chosen[self.tier] < w.size]
        if not windows:
            return
        on_host = self._spans(windows, step)
        sent = async_tensor_h2d(on_host, device=step.device)
        spans, oldest = Spans.of(sent[:-1]), sent[-1]
        longest = int(on_host[_HELD].max())
        scores = self._generated_scores(windows, config, step, spans, oldest, on_host)
        kept = self._selected(scores, config, step, spans, longest)
        table = step.batch.pages(self.group_id)
        if config.segments:
            self._gather(windows, spans, kept, step)
        else:
            step.kernels.compact(self.keys, self.values, table, spans, kept)
        if state.record is not None:
            req_ids = [window.req_id for window in windows]
            self._record(state.record.compress, req_ids, on_host, kept)

    def _gather(
        self,
        windows: Sequence[GeneratedWindow],
        spans: Spans,
        kept: torch.Tensor,
        step: TierStep,
    ) -> None:
        """Gather what stays of segments into their pages; newer tokens do not move."""
        starts = np.array([window.starts[self.tier] for window in windows])
        chosen = np.array([window.num_chosen[self.tier] for window in windows])
        ends = np.stack((starts + [window.size for window in windows], starts + chosen))
        firsts, lasts = starts // step.block_size, ends[1] // step.block_size
        targets = np.full((len(windows), lasts.max()), -1, dtype=np.int32)
        for column, window in enumerate(windows):
            pages = window.pages and window.pages[self.group_id]
            assert pages, f"request {window.req_id}: a segment has no pages"
            first, last = firsts[column], lasts[column]
            targets[column, first:last] = pages[: last - first]
        held, num_kept = async_tensor_h2d(ends.astype(np.int32), device=step.device)
        step.kernels.compact(
            self.keys,
            self.values,
            step.batch.pages(self.group_id),
            spans._replace(num_held=held, num_kept=num_kept),
            kept,
            async_tensor_h2d(targets, device=step.device),
            scratch=None if all(w.is_ordered for w in windows) else step.scratch,
        )

    def _spans(self, windows: Sequence[GeneratedWindow], step: TierStep) -> Ints:
        """``[num_fields + 1, num_windows]``: the spans, and each oldest query's
        position. All tokens before and after the window stay: its own are chosen from.
        """
        queries, offset, columns = step.generated, 0, []
        for window in windows:
            start, size = window.starts[self.tier], window.size
            kept = window.num_kept[self.tier]
            held = kept + size - window.num_chosen[self.tier]
            oldest = window.num_tokens - window.num_queries
            slot = ring = 0
            if queries is not None and window.num_queries:
                ring = oldest % queries.num_queries
                slot = queries.slot(window.req_id) * queries.num_queries
            row = step.batch.row_of[window.req_id]
            columns.append(
                (row, slot, ring, window.num_queries, held, kept,
                 start + window.num_first, held - start - size, start, size, offset,
                 oldest)
            )  # fmt: skip
            offset += held - start
        return np.array(columns, dtype=np.int32).T.copy()

    def _generated_scores(
        self,
        windows: Sequence[GeneratedWindow],
        config: PolicyConfig,
        step: TierStep,
        spans: Spans,
        oldest: torch.Tensor,
        on_host: Ints,
    ) -> torch.Tensor:
        """``[num_layers, 1 or num_kv_heads, num_scores]``, float32"""
        num_layers, size = len(self.layers), int(on_host[_HELD].sum())
        queries = step.generated
        if config.scoring.is_same_for_all_heads:
            # Newer tokens stay, as in the prompt.
            newer = torch.arange(size, dtype=torch.float32, device=step.device)
            return newer.expand(num_layers, 1, -1)
        buffer, ring = self.keys.like, None  # read by scorers that read queries
        if config.needs_queries:
            assert queries is not None
            queries.verify(self.indices, spans, oldest)
            buffer, ring = queries.buffer, queries.num_queries
        shape = (num_layers, self.keys.like.shape[1], size)
        # Those of prompts are of no use any more.
        scores = step.scratch.get(f"scores {self.group_id}", shape, torch.float32)
        step.kernels.score(
            config,
            self.attention,
            buffer,
            self.indices,
            self.keys,
            step.batch.pages(self.group_id),
            spans,
            scores,
            max_queries=ring or 1,
            max_tokens=int(on_host[_HELD].max()),
            max_columns=windows[0].size,
            ring=ring,
            scratch=step.scratch,
        )
        return scores


def compress_generated(groups: Sequence[CacheGroup], state: WorkerState) -> None:
    """Score and compact the plan's windows of generated tokens, after the forward pass.

    Args:
        groups: this worker's layers.
        state: of the worker.
    """
    plan = state.step.plan
    assert plan is not None
    for name in {window.policy for window in plan.generated}:
        windows = [w for w in plan.generated if w.policy == name and not w.is_found]
        for part in _parts(windows, state.max_scores):
            for group in groups:
                group.compress(part, state.policies[name], state)


def _parts(
    windows: Sequence[GeneratedWindow], max_tokens: int
) -> Iterator[list[GeneratedWindow]]:
    """The windows, cut so that the requests of a part hold at most ``max_tokens``."""
    part: list[GeneratedWindow] = []
    num_tokens = 0
    for window in windows:
        if part and num_tokens + window.num_tokens > max_tokens:
            yield part
            part, num_tokens = [], 0
        part.append(window)
        num_tokens += window.num_tokens
    if part:
        yield part
