"""Invariants of the block pool, for tests and to find leaks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager


def check_pool(pool: BlockPool, managers: Iterable[SingleTypeKVCacheManager]) -> None:
    """Check that every page is either free or held, and that requests share only pages
    of the prefix cache.

    Raises:
        AssertionError: names the page that is held twice, or the number lost.
    """
    null = pool.null_block.block_id
    queue = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    free = set(queue)
    assert len(queue) == len(free), "a page was freed twice"
    holders: dict[int, list[str]] = {}
    for manager in managers:
        for req_id, blocks in manager.req_to_blocks.items():
            where = f"request {req_id}, group {manager.kv_cache_group_id}"
            for block in blocks:
                if block.block_id == null:
                    continue
                holders.setdefault(block.block_id, []).append(where)
    for block_id, held_by in holders.items():
        block, where = pool.blocks[block_id], " and ".join(held_by)
        assert block_id not in free, f"page {block_id}: free, {where}"
        assert len(set(held_by)) == len(held_by), f"page {block_id}: twice in {where}"
        if len(held_by) > 1:
            assert block.block_hash is not None, f"page {block_id}: {where}"
            groups = {name.rpartition(" ")[2] for name in held_by}
            assert len(groups) == 1, f"page {block_id}: {where}"
        assert block.ref_cnt == len(held_by), (
            f"page {block_id}: {block.ref_cnt} references, {where}"
        )
    total = pool.num_gpu_blocks - 1
    assert len(free) + len(holders) == total, (
        f"{len(free)} pages are free and {len(holders)} held, of {total}"
    )
