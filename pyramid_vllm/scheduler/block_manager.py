"""Pages of one tier: allocated by cache length, freed as soon as tokens are evicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from pyramid_vllm.spec import TierAttentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from pyramid_vllm.scheduler.lengths import TierLengths


@dataclass
class _Compaction:
    """Pages for a prompt's kept tokens, secured when its last chunk is scheduled."""

    in_place: list[int]
    """Ascending block table indices of pages that only this request reads. They are not
    in the prefix cache, so that no other request can hit them."""
    reserved: list[KVCacheBlock]
    """New pages, if the request owns too few."""


class _Gathered(NamedTuple):
    """Pages into which a prompt's kept tokens are gathered."""

    pages: list[KVCacheBlock]
    num_taken: int
    """Number of new pages among them."""


class TierBlockManager(FullAttentionManager):
    """vLLM's manager of full attention, counting cache lengths instead of positions.

    With prefix caching a prompt's pages are shared until its last chunk. Its kept
    tokens are then gathered into pages of its own. The shared pages are released and
    stay in vLLM's cache. The target pages are secured before the chunk runs, so that
    a compaction cannot run out of pages.

    ``lengths`` and ``reserve`` are set by the scheduler, before the first request.
    """

    lengths: TierLengths
    reserve: Callable[[Request, int], int] | None = None
    """Pages to leave free when a request is admitted; set on one manager only."""
    kv_cache_spec: TierAttentionSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compactions: dict[str, _Compaction] = {}
        self._gathered: dict[str, _Gathered] = {}

    @property
    def _tier(self) -> int:
        return self.kv_cache_spec.tier

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
        """Pages that the request still needs; for the admission gate, at its peak."""
        if apply_admission_cap:
            request = self.lengths.request(request_id)
            num_slots = self.lengths.peaks(request, num_tokens)[self._tier]
        else:
            num_slots = self.lengths.slots(request_id, num_tokens, self._tier)
        num_blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_slots,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            **kwargs,
        )
        if apply_admission_cap and self.reserve is not None:
            num_free = self.block_pool.get_num_free_blocks()
            num_blocks += self.reserve(request, num_free)
        num_target = self._num_target(request_id, num_tokens_main_model)
        if num_target:
            held = self.req_to_blocks.get(request_id)
            shared = (
                sum(block.ref_cnt > 1 for block in held)
                if held
                else sum(block.ref_cnt > 0 for block in new_computed_blocks)
            )
            num_own = cdiv(num_slots, self.block_size) - shared
            num_blocks += max(0, num_target - num_own)
        return num_blocks

    def _num_target(self, request_id: str, num_tokens: int) -> int:
        """Pages of the tier's kept tokens, if a step up to ``num_tokens`` gathers them
        from pages that other requests may read; else 0."""
        if not self.enable_caching:
            return 0
        num_kept = self.lengths.kept_of_prompt(request_id, num_tokens)
        return 0 if num_kept is None else cdiv(num_kept[self._tier], self.block_size)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Pages for ``num_tokens`` positions, less the evicted and pruned ones."""
        num_slots = self.lengths.slots(request_id, num_tokens, self._tier)
        new = super().allocate_new_blocks(request_id, num_slots, num_tokens_main_model)
        num_target = self._num_target(request_id, num_tokens_main_model)
        if num_target:
            self._secure(request_id, num_target)
        return new

    def _secure(self, request_id: str, num_target: int) -> None:
        """Choose pages that a compaction can write in any case."""
        blocks, pool = self.req_to_blocks[request_id], self.block_pool
        # The last pages: the first ones are the likeliest to be hit.
        own = [i for i in reversed(range(len(blocks))) if blocks[i].ref_cnt == 1]
        in_place = sorted(own[:num_target])
        pool.evict_blocks(
            {blocks[i].block_id for i in in_place if blocks[i].block_hash is not None}
        )
        reserved = pool.get_new_blocks(num_target - len(in_place))
        self._compactions[request_id] = _Compaction(in_place, reserved)

    def cache_blocks(
        self, request: Request, num_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Offer full pages to other requests, except those that will be written."""
        num_tokens = self.lengths.num_shareable(request, num_tokens)
        if not num_tokens:
            return
        compaction = self._compactions.get(request.request_id)
        if compaction is not None and compaction.in_place:
            num_tokens = min(num_tokens, compaction.in_place[0] * self.block_size)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Release a request's pages, secured pages and counts; ``free`` calls it."""
        self.lengths.forget(request_id)
        compaction = self._compactions.pop(request_id, None)
        reserved = [] if compaction is None else compaction.reserved
        return super().pop_blocks_for_free(request_id) + reserved

    def gather_pages(self, request: Request) -> tuple[int, ...] | None:
        """Choose the pages into which a prompt is gathered; ``free_evicted`` makes them
        its block table.

        Call it after ``schedule()`` has returned, when every request of the step has
        its pages. Pages that are free then replace pages that would otherwise leave
        the prefix cache.

        Returns:
            The ids of the pages; None: the request compacts in place.
        """
        compaction = self._compactions.pop(request.request_id, None)
        if compaction is None:
            return None
        blocks, pool = self.req_to_blocks[request.request_id], self.block_pool
        num_full = request.num_prompt_tokens // self.block_size
        full = [i for i in compaction.in_place if i < num_full]
        # The first pages first: a page can only be hit if all before it are.
        saved = set(full[: pool.get_num_free_blocks()])
        fresh = pool.get_new_blocks(len(saved))
        if saved:
            self._offer(request, blocks, saved)
        written = [blocks[i] for i in compaction.in_place if i not in saved]
        pages = written + compaction.reserved + fresh
        num_taken = len(compaction.reserved) + len(fresh)
        self._gathered[request.request_id] = _Gathered(pages, num_taken)
        return tuple(block.block_id for block in pages)

    def _offer(
        self, request: Request, blocks: list[KVCacheBlock], saved: set[int]
    ) -> None:
        """Put pages that need not be written into the prefix cache."""
        first, end = min(saved), max(saved) + 1
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=blocks,
            num_cached_blocks=first,
            num_full_blocks=end,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
            block_mask=[i in saved for i in range(first, end)],
        )

    def free_evicted(self, request_id: str, num_held: int) -> int:
        """Free the pages that a request's first ``num_held`` cached tokens do not need.

        Call it only after ``schedule()`` and every ``gather_pages`` of the step have
        returned: the step that compacts still reads these pages, in this tier or,
        because tiers share memory, in another one.

        Returns:
            Decrease in the request's number of pages.
        """
        pages, num_taken = self._gathered.pop(request_id, (None, 0))
        return self._truncate(request_id, num_held, pages) - num_taken

    def _truncate(
        self, request_id: str, num_held: int, pages: list[KVCacheBlock] | None
    ) -> int:
        """Keep a request's first pages, or the first of ``pages``; free the others.

        Returns:
            Number of freed pages.
        """
        held = self.req_to_blocks[request_id]
        source = held if pages is None else pages
        kept = source[: cdiv(num_held, self.block_size)]
        freed = {block.block_id: block for block in (*held, *source)}
        for block in kept:
            del freed[block.block_id]
        self.req_to_blocks[request_id] = kept
        self.block_pool.free_blocks(reversed(freed.values()))
        return len(freed)

    def check_settled(self) -> None:
        """Check that no secured or gathered pages outlive their step.

        Raises:
            AssertionError: names the requests.
        """
        assert not self._compactions, f"secured: {list(self._compactions)}"
        assert not self._gathered, f"gathered: {list(self._gathered)}"


def register_spec(vllm_config: VllmConfig | None) -> None:
    """Register the manager of tiers with vLLM. Idempotent."""
    # vLLM fills the registry only while it is empty, so its specs come first.
    register_all_kvcache_specs(vllm_config)
    KVCacheSpecRegistry.register(TierAttentionSpec, manager_class=TierBlockManager)
