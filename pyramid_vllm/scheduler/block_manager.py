"""Pages of one tier: allocated by cache length, freed the moment tokens are evicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from pyramid_vllm.spec import TierAttentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from pyramid_vllm.scheduler.lengths import TierLengths


class TierBlockManager(FullAttentionManager):
    """vLLM's manager of full attention, counting cache lengths instead of positions.

    ``lengths`` is set by the scheduler, before the first request.
    """

    lengths: TierLengths
    kv_cache_spec: TierAttentionSpec

    def _slots(self, request_id: str, num_tokens: int) -> int:
        return self.lengths.slots(request_id, num_tokens, self.kv_cache_spec.tier)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Pages that the request still needs; the admission gate asks for the peak."""
        if apply_admission_cap:
            tier = self.kv_cache_spec.tier
            num_slots = self.lengths.peak(request_id, num_tokens, tier)
        else:
            num_slots = self._slots(request_id, num_tokens)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_slots,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            **kwargs,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> list[KVCacheBlock]:
        """Pages for ``num_tokens`` positions, less the evicted and pruned ones."""
        num_slots = self._slots(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, num_slots, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Also called by ``free``: counts go with the pages."""
        self.lengths.forget(request_id)
        return super().pop_blocks_for_free(request_id)

    def free_tail(self, request_id: str, num_held: int) -> int:
        """Free the pages past the first ``num_held`` tokens; returns how many.

        Call it only after ``schedule()`` has returned: the step that compacts still
        reads these pages, and no other request may get them within it.
        """
        blocks = self.req_to_blocks[request_id]
        num_kept = cdiv(num_held, self.block_size)
        tail = blocks[num_kept:]
        del blocks[num_kept:]
        self.block_pool.free_blocks(reversed(tail))
        return len(tail)


def register_spec(vllm_config: VllmConfig | None) -> None:
    """Tell vLLM which manager serves a tier. Can be called again."""
    # The registry fills itself only while it is empty, so vLLM's own specs go first.
    register_all_kvcache_specs(vllm_config)
    KVCacheSpecRegistry.register(TierAttentionSpec, manager_class=TierBlockManager)


def check_integrity(
    pool: BlockPool, managers: Iterable[SingleTypeKVCacheManager]
) -> None:
    """Check that every page is either free or in exactly one table.

    Holds without prefix caching, where no page is shared.

    Raises:
        AssertionError: says which page is held twice, or how many are lost.
    """
    null = pool.null_block.block_id
    free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
    held: dict[int, str] = {}
    for manager in managers:
        for req_id, blocks in manager.req_to_blocks.items():
            for block in blocks:
                if block.block_id == null:
                    continue
                where = f"request {req_id}, group {manager.kv_cache_group_id}"
                taken = held.get(block.block_id)
                assert taken is None, f"page {block.block_id}: {taken} and {where}"
                assert block.block_id not in free, (
                    f"page {block.block_id}: free, {where}"
                )
                assert block.ref_cnt == 1, (
                    f"page {block.block_id}: {block.ref_cnt} refs"
                )
                held[block.block_id] = where
    total = pool.num_gpu_blocks - 1
    assert len(free) + len(held) == total, (
        f"{len(free)} pages are free and {len(held)} held, of {total}"
    )
