"""What the pages of a block pool are used for, and which of them are read together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PageCount:
    """Shares of a pool's pages at one time."""

    at: float
    """Seconds since the start."""
    running: float
    """Held by requests."""
    cached: float
    """Held by nobody, in the prefix cache."""
    free: float


def count_pages(scheduler: Any, at: float) -> PageCount:
    """Count the pages of a scheduler's pool.

    Args:
        scheduler: vLLM's.
        at: seconds since the start.
    """
    pool = scheduler.kv_cache_manager.block_pool
    running = cached = 0
    for block in pool.blocks:
        if block.is_null:
            continue
        if block.ref_cnt:
            running += 1
        elif block.block_hash is not None:
            cached += 1
    total = len(pool.blocks) - 1  # the null page
    return PageCount(
        at, running / total, cached / total, (total - running - cached) / total
    )


def saved_tokens(scheduler: Any, req_ids: Iterable[str]) -> float:
    """Tokens times layers that need not be read again, if each page of full-attention
    layers is read once a step however many of its sequences share it.

    A page with n readers is counted as 1/n for each of them: all of them are taken to
    be in the step.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = scheduler.kv_cache_config.kv_cache_groups
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    saved = 0.0
    names = list(req_ids)
    for manager, group in zip(managers, groups, strict=True):
        if not isinstance(group.kv_cache_spec, FullAttentionSpec):
            continue
        tokens = manager.block_size * len(group.layer_names)
        for name in names:
            saved += tokens * _again(manager.req_to_blocks.get(name, ()))
    return saved


def _again(blocks: Sequence[Any]) -> float:
    """Pages that others read too, less their share: readers fall along a table, so
    runs of equally many readers are found by bisection."""
    start, again = 0, 0.0
    while start < len(blocks) and blocks[start].ref_cnt > 1:
        readers = blocks[start].ref_cnt
        low, high = start, len(blocks)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if blocks[middle].ref_cnt == readers else (low, middle)
            )
        again += (high - start) * (1 - 1 / readers)
        start = high
    return again
