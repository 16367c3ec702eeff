"""Compressed generation: groups of tokens that have left the recent window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

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
from pyramid_vllm.worker.batch import Batch
from pyramid_vllm.worker.layer import TieredLayer, over_heads
from pyramid_vllm.worker.query_slots import GroupQueries
from pyramid_vllm.worker.record import KeptRecord

#: Keys that are gathered at once, in bytes of float32.
_SCRATCH_BYTES = 1 << 26


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
    batch: Batch,
    record: KeptRecord | None = None,
) -> None:
    """Score and compact the plan's groups of generated tokens, after the forward pass.

    Args:
        plan: the step's plan.
        policies: by the names that the plan uses.
        cache_groups: this worker's layers.
        queries: where the layers keep their queries; None where none are read.
        batch: the runner's batch.
        record: told what stays.
    """
    for name in {group.policy for group in plan.groups}:
        groups = [group for group in plan.groups if group.policy == name]
        config = policies[name]
        for due, order in _compressed(groups, config, cache_groups, queries, batch):
            if record is not None:
                record.group(due.layers, groups, order, due.num_kept)


def _compressed(
    groups: Sequence[GroupWindow],
    config: PolicyConfig,
    cache_groups: Sequence[CacheGroup],
    queries: GroupQueries | None,
    batch: Batch,
) -> Iterator[tuple[_Due, torch.Tensor]]:
    """The same for requests of one policy, whose groups are equally long.

    Yields:
        Layers that are done, and the order of their groups' tokens.
    """
    block_size = cache_groups[0].layers[0].cache.key.shape[2]
    for due in _batches(groups, cache_groups, batch):
        order = order_of_group(_scores(groups, config, due, queries))
        moves = group_moves(
            due.block_table,
            block_size,
            due.starts,
            due.num_held,
            order,
            due.num_kept,
        )
        for index, layer in enumerate(due.layers):
            of_layer = Moves(*(part[index] for part in moves))
            move_tokens(layer.cache.key, layer.cache.value, of_layer)
        yield due, order


def _batches(
    groups: Sequence[GroupWindow], cache_groups: Sequence[CacheGroup], batch: Batch
) -> Iterator[_Due]:
    """Layers together, as long as their keys fit into the scratch memory."""
    rows = [batch.row_of[group.req_id] for group in groups]
    size = groups[0].group
    longest = max(max(group.num_kept) for group in groups) + size
    first = cache_groups[0].layers[0].cache.key
    num_blocks = cdiv(longest, first.shape[2])
    tiers, tables = [], []
    layers: list[TieredLayer] = []
    most = max(1, _SCRATCH_BYTES // (4 * len(rows) * num_blocks * first[0].numel()))
    for cache_group in cache_groups:
        table = batch.pages(cache_group.group_id)[rows, :num_blocks]
        tables += [table] * len(cache_group.layers)
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
    block_table = torch.stack(tables).long()
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
