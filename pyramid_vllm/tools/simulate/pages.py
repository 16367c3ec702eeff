"""How the pages of a block pool are used, and which of them are read together."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class PageCount(NamedTuple):
    """Shares of a pool's pages at one time."""

    at: float
    """Seconds since the start."""
    running: float
    """Held by requests."""
    cached: float
    """In the prefix cache, held by no request."""
    free: float


def count_pages(scheduler: Any, at: float) -> PageCount:
    """Count the pages of a scheduler's pool, ``at`` seconds since the start."""
    pool = scheduler.kv_cache_manager.block_pool
    blocks = [block for block in pool.blocks if not block.is_null]
    running = sum(b.ref_cnt > 0 for b in blocks)
    cached = sum(not b.ref_cnt and b.block_hash is not None for b in blocks)
    counts = running, cached, len(blocks) - running - cached
    return PageCount(at, *(count / len(blocks) for count in counts))


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
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            tokens = manager.block_size * len(group.layer_names)
            tables = (manager.req_to_blocks.get(name, ()) for name in names)
            for table in tables:
                saved += tokens * _again(table)
    return saved


def _again(blocks: Sequence[Any]) -> float:
    """Pages that others read too, less their share: the number of readers falls along
    a table, so runs of equally many readers are found by bisection."""
    start, again = 0, 0.0
    while start < len(blocks) and (readers := blocks[start].ref_cnt) > 1:
        end = bisect_right(blocks, -readers, start, key=lambda block: -block.ref_cnt)
        again += (end - start) * (1 - 1 / readers)
        start = end
    return again
