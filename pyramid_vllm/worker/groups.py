"""Compressed generation: groups of tokens that have left the recent window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.utils.math_utils import cdiv

from pyramid_vllm.kernels import compact_range, group_scores, select_in_group
from pyramid_vllm.plan import GroupWindow, StepPlan
from pyramid_vllm.policy import PolicyConfig
from pyramid_vllm.worker.layer import TieredLayer, over_heads
from pyramid_vllm.worker.step import BatchRows

if TYPE_CHECKING:
    from pyramid_vllm.attention.layout import KVViews


class GroupQueries:
    """The newest queries of every generating request, in every layer.

    One buffer for as many requests as run at once, counted against the KV memory. A
    request has a slot of it; the query of position ``p`` lies at ``p % num_queries``.

    Args:
        num_layers: tiered layers of this worker.
        max_num_seqs: most requests at once.
        num_queries: queries of a request.
        shape: ``(num_heads, head_size)``.
        dtype: of the queries.
    """

    def __init__(
        self,
        num_layers: int,
        max_num_seqs: int,
        num_queries: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.num_queries = num_queries
        self.buffer = torch.zeros(
            num_layers, max_num_seqs * num_queries, *shape, dtype=dtype
        )
        self._slot_of: dict[str, int] = {}
        self._free = list(reversed(range(max_num_seqs)))
        self._rows = torch.empty(0, dtype=torch.int64)
        self._from_end = self._target = self._rows
        self._step: BatchRows | None = None

    @staticmethod
    def num_bytes(
        num_layers: int,
        max_num_seqs: int,
        num_queries: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> int:
        """Bytes of the buffer."""
        elements = num_layers * max_num_seqs * num_queries * shape[0] * shape[1]
        return elements * dtype.itemsize

    def __len__(self) -> int:
        """Requests that have a slot."""
        return len(self._slot_of)

    def release(self, req_ids: Iterable[str]) -> None:
        """Free the slots of requests that finished or were preempted."""
        for req_id in req_ids:
            slot = self._slot_of.pop(req_id, None)
            if slot is not None:
                self._free.append(slot)

    def _begin(self, step: BatchRows) -> None:
        """Find the step's generated tokens, and a slot for each of their requests."""
        self._step = step
        rows, slots, ends, counts = [], [], [], []
        for row, (req_id, end, generated, scheduled) in enumerate(step.progress()):
            if generated <= 0:
                continue
            slot = self._slot_of.get(req_id)
            if slot is None:
                slot = self._slot_of[req_id] = self._free.pop()
            rows.append(row)
            slots.append(slot)
            ends.append(end)
            counts.append(min(scheduled, generated, self.num_queries))
        count = torch.tensor(counts, dtype=torch.int64)
        last = torch.tensor([ends, slots, rows], dtype=torch.int64)
        end, slot, row = last.repeat_interleave(count, dim=1)
        # 1 for a request's newest token, 2 for the one before.
        first = (count.cumsum(0) - count).repeat_interleave(count)
        self._rows, self._from_end = row, torch.arange(len(row)) - first + 1
        place = (end - self._from_end) % self.num_queries
        self._target = slot * self.num_queries + place

    def write(
        self, layer: int, tier: int, query: torch.Tensor, step: BatchRows
    ) -> None:
        """Keep a layer's queries of this step's generated tokens.

        Args:
            layer: index of the layer.
            tier: its tier.
            query: ``[num_rows, num_heads, head_size]``.
            step: this step's rows.
        """
        if step is not self._step:
            self._begin(step)
        if not len(self._target):
            return
        source = step.starts[tier, 1:][self._rows] - self._from_end
        self.buffer[layer].index_copy_(0, self._target, query[source])

    def newest(
        self, layers: Sequence[int], req_ids: Sequence[str], ends: Sequence[int]
    ) -> torch.Tensor:
        """Queries of some requests, newest last.

        Args:
            layers: indices of the layers.
            req_ids: the requests.
            ends: computed tokens of each.

        Returns:
            ``[num_layers, num_requests, num_queries, num_heads, head_size]``
        """
        slots = torch.tensor([self._slot_of[req_id] for req_id in req_ids])
        oldest = torch.tensor(ends)[:, None]
        place = (oldest + torch.arange(self.num_queries)) % self.num_queries
        layer = torch.tensor(layers)[:, None, None]
        return self.buffer[layer, slots[:, None] * self.num_queries + place]


class CacheGroup(NamedTuple):
    """Layers of one tier that share a block table."""

    group_id: int
    """vLLM's KV cache group."""
    tier: int
    layers: list[TieredLayer]
    caches: list[KVViews]


def compress_groups(
    plan: StepPlan,
    config: PolicyConfig,
    cache_groups: Sequence[CacheGroup],
    queries: GroupQueries | None,
    input_batch: Any,
) -> None:
    """Score and compact the plan's groups of generated tokens, after the forward pass.

    Args:
        plan: the step's plan.
        config: the policy.
        cache_groups: this worker's layers.
        queries: where the layers keep their queries; None where none are read.
        input_batch: the runner's batch.
    """
    for cache_group in cache_groups:
        tier = cache_group.tier
        due = [group for group in plan.groups if group.group_kept[tier] < group.group]
        if not due:
            continue
        rows = [input_batch.req_id_to_index[group.req_id] for group in due]
        size, num_kept = due[0].group, due[0].group_kept[tier]
        held = torch.tensor([group.num_kept[tier] + size - num_kept for group in due])
        starts = torch.tensor([group.starts[tier] for group in due])
        table = input_batch.block_table[cache_group.group_id]
        num_blocks = cdiv(int(held.max()), table.block_size)
        block_table = torch.from_numpy(table.block_table.np[rows, :num_blocks]).long()
        if queries is None:
            # No query is read: as in the prompt, newer tokens stay.
            newer = torch.arange(size, dtype=torch.float32)
            scores = newer.expand(len(cache_group.layers), len(due), 1, size)
        else:
            scores = _scores(
                due, config, cache_group, queries, block_table, held, starts
            )
        kept = select_in_group(scores, num_kept)
        for cache, chosen in zip(cache_group.caches, kept, strict=True):
            compact_range(
                cache.key, cache.value, block_table, starts, size, held, chosen
            )


def _scores(
    due: Sequence[GroupWindow],
    config: PolicyConfig,
    cache_group: CacheGroup,
    queries: GroupQueries,
    block_table: torch.Tensor,
    held: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """``[num_layers, num_requests, 1 or num_kv_heads, group]``"""
    layers = cache_group.layers
    query = queries.newest(
        [layer.index for layer in layers],
        [group.req_id for group in due],
        [group.num_tokens for group in due],
    )
    # [requests, blocks, heads, block_size, size] -> [requests, tokens, heads, size]
    key = torch.stack(
        [
            cache.key[block_table].transpose(2, 3).flatten(1, 2)
            for cache in cache_group.caches
        ]
    )
    num_queries = torch.tensor([group.num_queries for group in due])
    scores = group_scores(
        query.flatten(0, 1),
        key.flatten(0, 1),
        held.repeat(len(layers)),
        num_queries.repeat(len(layers)),
        starts.repeat(len(layers)),
        due[0].group,
        layers[0].scale,
        config.distance_weight,
        layers[0].logits_soft_cap,
    )
    if config.selection == "layer":
        scores = over_heads(scores, True)
    return scores.view(len(layers), len(due), *scores.shape[1:])
