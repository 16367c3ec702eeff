"""Pages of one tier: allocated by cache length, freed as soon as tokens are evicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

    first: int
    """Place in the block table of the first page that is written."""
    targets: list[KVCacheBlock | None]
    """From there on: new pages, or None where the request writes its own page, which no
    other request reads. New pages replace such pages as late as after the step."""


class TierBlockManager(FullAttentionManager):
    """vLLM's manager of full attention, counting cache lengths instead of positions.

    With prefix caching a prompt's pages may be shared until its last chunk. What it
    got from the cache stays; what it keeps of the rest is then gathered into pages that
    no other request reads. They are secured before the chunk runs, so that a compaction
    cannot run out of pages: a request that hits one of them brings another for it.

    ``lengths`` and ``reserve`` are set by the scheduler, before the first request.
    """

    lengths: TierLengths
    reserve: Callable[[Request, int, int], int] | None = None
    """Pages to leave free when a request is admitted; set on one manager only."""
    kv_cache_spec: TierAttentionSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compactions: dict[str, _Compaction] = {}
        self._written: dict[int, tuple[str, int]] = {}
        """Ids of own pages that compactions write: request and place among targets."""
        self._lost: list[tuple[str, int]] = []
        """Such pages that were hit in this step, until they are replaced."""

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
            num_blocks += self.reserve(request, num_free, len(new_computed_blocks))
        if not self.enable_caching:
            return num_blocks
        num_blocks += sum(b.block_id in self._written for b in new_computed_blocks)
        place = self._written_pages(request_id, num_tokens_main_model)
        if place is not None:
            held = self.req_to_blocks.get(request_id)
            # The request adds a reference to the pages that it hits now.
            num_others, blocks = (1, held) if held else (0, new_computed_blocks)
            num_blocks += sum(block.ref_cnt > num_others for block in blocks[place])
        return num_blocks

    def _written_pages(self, request_id: str, num_tokens: int) -> slice | None:
        """Places in the block table that a step up to ``num_tokens`` gathers a prompt's
        kept tokens into; None: it gathers nothing that others may read."""
        if not self.enable_caching:
            return None
        kept = self.lengths.kept_of_prompt(request_id, num_tokens)
        if kept is None:
            return None
        request = self.lengths.request(request_id)
        if kept[self._tier] == request.num_prompt_tokens:
            return None
        first = self.lengths.shared(request) // self.block_size
        return slice(first, cdiv(kept[self._tier], self.block_size))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Share cached pages; those that another request would write are lost to it."""
        for block in new_computed_blocks:
            lost = self._written.pop(block.block_id, None)
            if lost is not None:
                self._lost.append(lost)
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, *args, **kwargs
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Pages for ``num_tokens`` positions, less the evicted and pruned ones."""
        # Not earlier: all tiers must hold the pages that they hit before one is taken.
        for req_id, i in self._lost:
            (page,) = self.block_pool.get_new_blocks(1)
            self._compactions[req_id].targets[i] = page
        self._lost.clear()
        num_slots = self.lengths.slots(request_id, num_tokens, self._tier)
        new = super().allocate_new_blocks(request_id, num_slots, num_tokens_main_model)
        place = self._written_pages(request_id, num_tokens_main_model)
        if place is not None:
            self._secure(request_id, place)
        return new

    def _secure(self, request_id: str, place: slice) -> None:
        """Choose pages that a compaction can write in any case."""
        written = self.req_to_blocks[request_id][place]
        shared = [block.ref_cnt > 1 for block in written]
        new = iter(self.block_pool.get_new_blocks(sum(shared)))
        targets = [next(new) if is_shared else None for is_shared in shared]
        for i, (block, target) in enumerate(zip(written, targets, strict=True)):
            if target is None:
                self._written[block.block_id] = request_id, i
        self._compactions[request_id] = _Compaction(place.start, targets)

    def cache_blocks(
        self, request: Request, num_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Offer full pages to other requests, until the request evicts tokens."""
        num_tokens = self.lengths.num_shareable(request, num_tokens)
        if num_tokens:
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Release a request's pages, secured pages and counts; ``free`` calls it."""
        self.lengths.forget(request_id)
        blocks = super().pop_blocks_for_free(request_id)
        compaction = self._compactions.pop(request_id, None)
        if compaction is None:
            return blocks
        for block in blocks:
            self._written.pop(block.block_id, None)
        return blocks + [page for page in compaction.targets if page is not None]

    def gather_pages(self, request: Request) -> tuple[int, ...] | None:
        """Settle into which pages a prompt's kept tokens are gathered; ``truncate``
        makes them its block table.

        Call it after ``schedule()`` has returned, when every request of the step has
        its pages. Free pages that hold nothing then replace pages of the prefix cache;
        no cached page goes to save another.

        Returns:
            The ids of the pages from the first written one on; None: they are those of
            the block table.
        """
        compaction = self._compactions.get(request.request_id)
        if compaction is None:
            return None
        blocks = self.req_to_blocks[request.request_id][compaction.first :]
        # The first pages first: a page can only be hit if all before it are.
        for i, own in enumerate(blocks[: len(compaction.targets)]):
            if compaction.targets[i] is not None:
                continue
            del self._written[own.block_id]
            if own.block_hash is None:
                continue
            compaction.targets[i] = page = self._plain_page()
            if page is None:
                self.block_pool.evict_blocks({own.block_id})
        if not any(compaction.targets):
            del self._compactions[request.request_id]
            return None
        pairs = zip(compaction.targets, blocks, strict=False)
        return tuple((target or own).block_id for target, own in pairs)

    def _plain_page(self) -> KVCacheBlock | None:
        """A free page that holds nothing of the prefix cache, if there is one."""
        pool = self.block_pool
        if not pool.get_num_free_blocks():
            return None
        # The queue begins with the page that is used next: cached ones come last.
        head = pool.free_block_queue.fake_free_list_head.next_free_block
        return None if head.block_hash is not None else pool.get_new_blocks(1)[0]

    def truncate(self, request_id: str, num_held: int) -> list[KVCacheBlock]:
        """Take a request's pages away that its first ``num_held`` cached tokens do not
        need.

        Free them only after ``schedule()`` and every ``gather_pages`` of the step have
        returned: the step that compacts still reads these pages, in this tier or,
        because tiers share memory, in another one.

        Returns:
            The pages, in the order of their tokens, for the caller to free.
        """
        held = self.req_to_blocks[request_id]
        kept = held[: cdiv(num_held, self.block_size)]
        compaction = self._compactions.pop(request_id, None)
        if compaction is not None:
            for i, target in enumerate(compaction.targets, compaction.first):
                kept[i] = target or kept[i]
        self.req_to_blocks[request_id] = kept
        stays = {block.block_id for block in kept}
        return [block for block in held if block.block_id not in stays]

    def check_settled(self) -> None:
        """Check that no secured pages outlive their step.

        Raises:
            AssertionError: names the requests.
        """
        assert not self._compactions, f"secured: {list(self._compactions)}"
        assert not self._written, f"written: {list(self._written.values())}"
        assert not self._lost, f"lost: {self._lost}"


def register_spec(vllm_config: VllmConfig | None) -> None:
    """Register the manager of tiers with vLLM. Idempotent."""
    # vLLM fills the registry only while it is empty, so its specs come first.
    register_all_kvcache_specs(vllm_config)
    KVCacheSpecRegistry.register(TierAttentionSpec, manager_class=TierBlockManager)
