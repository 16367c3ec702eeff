"""Compressed generation: groups of tokens that have left the recent window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.math_utils import cdiv

from pyramid_vllm.kernels import (
    Moves,
    group_moves,
    group_scores,
    move_tokens,
    order_of_group,
)
from pyramid_vllm.plan import GroupWindow, StepPlan
from pyramid_vllm.policy import PolicyConfig
from pyramid_vllm.worker.layer import TieredLayer, over_heads
from pyramid_vllm.worker.step import BatchRows

#: Keys that are gathered at once, in bytes of float32.
_SCRATCH_BYTES = 1 << 26


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
        self._sources: dict[int, torch.Tensor] = {}
        """By tier: the rows of its queries that are kept, while ``_step`` runs."""

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
        self._step, self._sources = step, {}
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
        # In the order of the batch; 1 is a request's newest token, 2 the one before.
        behind = count.cumsum(0).repeat_interleave(count)
        self._rows, self._from_end = row, behind - torch.arange(len(row))
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
        source = self._sources.get(tier)
        if source is None:
            source = step.starts[tier, 1:][self._rows] - self._from_end
            self._sources[tier] = source
        # Where every row is kept, they are so in the batch's order.
        rows = query if len(source) == len(query) else query[source]
        self.buffer[layer].index_copy_(0, self._target, rows)

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


class _Due(NamedTuple):
    """Some layers, and the groups of generated tokens that they compress now.

    Lengths are ``[num_layers, num_requests]``, int64.
    """

    layers: list[TieredLayer]
    block_table: torch.Tensor
    """``[num_layers, num_requests, max_blocks]``, int64."""
    starts: torch.Tensor
    num_held: torch.Tensor
    num_kept: torch.Tensor


def compress_groups(
    plan: StepPlan,
    policies: Mapping[str, PolicyConfig],
    cache_groups: Sequence[CacheGroup],
    queries: GroupQueries | None,
    input_batch: Any,
) -> None:
    """Score and compact the plan's groups of generated tokens, after the forward pass.

    Args:
        plan: the step's plan.
        policies: by the names that the plan uses.
        cache_groups: this worker's layers.
        queries: where the layers keep their queries; None where none are read.
        input_batch: the runner's batch.
    """
    for name in {group.policy for group in plan.groups}:
        groups = [group for group in plan.groups if group.policy == name]
        _compress(groups, policies[name], cache_groups, queries, input_batch)


def _compress(
    groups: Sequence[GroupWindow],
    config: PolicyConfig,
    cache_groups: Sequence[CacheGroup],
    queries: GroupQueries | None,
    input_batch: Any,
) -> None:
    """The same for requests of one policy, whose groups are equally long."""
    block_size = cache_groups[0].layers[0].cache.key.shape[2]
    for due in _batches(groups, cache_groups, input_batch):
        scores = _scores(groups, config, due, queries)
        moves = group_moves(
            due.block_table,
            block_size,
            due.starts,
            due.num_held,
            order_of_group(scores),
            due.num_kept,
        )
        for index, layer in enumerate(due.layers):
            of_layer = Moves(*(part[index] for part in moves))
            move_tokens(layer.cache.key, layer.cache.value, of_layer)


def _batches(
    groups: Sequence[GroupWindow], cache_groups: Sequence[CacheGroup], input_batch: Any
) -> Iterator[_Due]:
    """Layers together, as long as their keys fit into the scratch memory."""
    rows = [input_batch.req_id_to_index[group.req_id] for group in groups]
    size = groups[0].group
    longest = max(max(group.num_kept) for group in groups) + size
    first = cache_groups[0].layers[0].cache.key
    num_blocks = cdiv(longest, first.shape[2])
    tiers, tables = [], []
    layers: list[TieredLayer] = []
    most = max(1, _SCRATCH_BYTES // (4 * len(rows) * num_blocks * first[0].numel()))
    for cache_group in cache_groups:
        table = input_batch.block_table[cache_group.group_id].block_table.np
        tables += [table[rows, :num_blocks]] * len(cache_group.layers)
        tiers += [cache_group.tier] * len(cache_group.layers)
        layers += cache_group.layers
    starts, held, kept = (
        torch.tensor(values).T[tiers]
        for values in (
            [group.starts for group in groups],
            [group.num_kept for group in groups],
            [group.group_kept for group in groups],
        )
    )
    block_table = torch.from_numpy(np.stack(tables)).long()
    for i in range(0, len(layers), most):
        part = slice(i, i + most)
        yield _Due(
            layers[part],
            block_table[part],
            starts[part],
            held[part] + size - kept[part],
            kept[part],
        )


def _scores(
    groups: Sequence[GroupWindow],
    config: PolicyConfig,
    due: _Due,
    queries: GroupQueries | None,
) -> torch.Tensor:
    """``[num_layers, num_requests, 1 or num_kv_heads, group]``"""
    num_layers, num_requests = due.starts.shape
    size = groups[0].group
    if not config.needs_queries:
        # No query is read: as in the prompt, newer tokens stay.
        newer = torch.arange(size, dtype=torch.float32)
        return newer.expand(num_layers, num_requests, 1, size)
    assert queries is not None
    query = queries.newest(
        [layer.index for layer in due.layers],
        [group.req_id for group in groups],
        [group.num_tokens for group in groups],
    )
    num_queries = torch.tensor([group.num_queries for group in groups])
    scores = group_scores(
        query.flatten(0, 1),
        _gather_keys(due),
        due.num_held.flatten(),
        num_queries.repeat(num_layers),
        due.starts.flatten(),
        size,
        due.layers[0].scale,
        config.distance_weight,
        due.layers[0].logits_soft_cap,
        _sink_logits(due),
    )
    if config.selection == "layer":
        scores = over_heads(scores, True)
    return scores.view(num_layers, num_requests, *scores.shape[1:])


def _sink_logits(due: _Due) -> torch.Tensor | None:
    """``[num_layers * num_requests, num_heads]``, float32; None without sinks."""
    sinks = [layer.sink_logits for layer in due.layers]
    given = next((logits for logits in sinks if logits is not None), None)
    if given is None:
        return None
    # Minus infinity gets no attention.
    none = torch.full_like(given, float("-inf"))
    rows = torch.stack([none if logits is None else logits for logits in sinks])
    return rows.float().repeat_interleave(due.starts.shape[1], dim=0)


def _gather_keys(due: _Due) -> torch.Tensor:
    """``[num_layers * num_requests, max_tokens, num_kv_heads, head_size]``"""
    _, num_heads, block_size, head_size = due.layers[0].cache.key.shape
    num_layers, num_requests, num_blocks = due.block_table.shape
    pages = torch.empty(
        (num_layers, num_requests * num_blocks, num_heads, head_size, block_size),
        dtype=due.layers[0].cache.key.dtype,
    )
    for layer, table, out in zip(due.layers, due.block_table, pages, strict=True):
        torch.index_select(layer.cache.key.transpose(2, 3), 0, table.flatten(), out=out)
    # [rows, heads, size, blocks, block_size]: as the product with queries reads them
    pages = pages.view(-1, num_blocks, num_heads, head_size, block_size)
    keys = pages.permute(0, 2, 3, 1, 4).reshape(len(pages), num_heads, head_size, -1)
    return keys.permute(0, 3, 1, 2)
