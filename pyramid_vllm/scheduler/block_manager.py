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

    first: int
    """Place in the block table of the first page that is replaced."""
    in_place: list[int]
    """Places of pages that only this request reads, ascending; the last ones, because
    the first are the likeliest to be hit. New pages may replace them until the end of
    ``schedule()``."""
    new: list[KVCacheBlock]
    """Pages that the request takes in addition."""


class Gathered(NamedTuple):
    """Where a prompt's kept tokens are gathered."""

    pages: tuple[int, ...]
    """Their ids, in order."""
    is_ordered: bool
    """Whether none of them holds tokens of the request that are read later."""


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
        """Ids of own pages that compactions write: request and place in its table."""
        self._lost: list[str] = []
        """Whose compactions have lost a page to a hit, until it is replaced."""

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
        target = self._target(request_id, num_tokens_main_model)
        if target is not None:
            held = self.req_to_blocks.get(request_id)
            # The request adds a reference to the pages that it hits now.
            num_others, blocks = (1, held) if held else (0, new_computed_blocks)
            first, num_target = target
            num_shared = sum(block.ref_cnt > num_others for block in blocks[first:])
            num_own = cdiv(num_slots, self.block_size) - first - num_shared
            num_blocks += max(0, num_target - num_own)
        return num_blocks

    def _target(self, request_id: str, num_tokens: int) -> tuple[int, int] | None:
        """The first place in the block table that a step up to ``num_tokens`` gathers
        a prompt's kept tokens into, and the number of pages; None: it gathers nothing
        that others may read."""
        if not self.enable_caching:
            return None
        kept = self.lengths.kept_of_prompt(request_id, num_tokens)
        request = self.lengths.request(request_id)
        if kept is None or kept[self._tier] == request.num_prompt_tokens:
            return None
        first = self.lengths.shared(request) // self.block_size
        return first, cdiv(kept[self._tier], self.block_size) - first

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Share cached pages; those that another request would write are lost to it."""
        for block in new_computed_blocks:
            self.lengths.hits[block.block_id] = block.block_hash
            lost = self._written.pop(block.block_id, None)
            if lost is not None:
                req_id, place = lost
                self._compactions[req_id].in_place.remove(place)
                self._lost.append(req_id)
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, *args, **kwargs
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Pages for ``num_tokens`` positions, less the evicted and pruned ones."""
        # Not earlier: all tiers must hold the pages that they hit before one is taken.
        for req_id in self._lost:
            self._compactions[req_id].new += self.block_pool.get_new_blocks(1)
        self._lost.clear()
        num_slots = self.lengths.slots(request_id, num_tokens, self._tier)
        new = super().allocate_new_blocks(request_id, num_slots, num_tokens_main_model)
        target = self._target(request_id, num_tokens_main_model)
        if target is not None:
            self._secure(request_id, *target)
        return new

    def _secure(self, request_id: str, first: int, num_target: int) -> None:
        """Choose pages that a compaction can write in any case."""
        blocks = self.req_to_blocks[request_id]
        own = [i for i in range(first, len(blocks)) if blocks[i].ref_cnt == 1]
        in_place = own[max(0, len(own) - num_target) :]
        for i in in_place:
            self._written[blocks[i].block_id] = request_id, i
        new = self.block_pool.get_new_blocks(num_target - len(in_place))
        self._compactions[request_id] = _Compaction(first, in_place, new)

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
        return blocks + compaction.new

    def num_others_read(self, request_id: str) -> int:
        """First tokens of a request whose pages other requests read, too."""
        count = 0
        for block in self.req_to_blocks[request_id]:
            if block.ref_cnt < 2:
                break
            count += 1
        return count * self.block_size

    def keep_shared(self, request: Request) -> list[KVCacheBlock]:
        """Secure fewer pages for a prompt of which more stays whole than was thought.

        Returns:
            Secured pages that are not needed, for the caller to free.
        """
        req_id, prompt = request.request_id, request.num_prompt_tokens
        compaction = self._compactions.get(req_id)
        if compaction is None:
            return []
        shared = self.lengths.shared(request)
        rule = self.lengths.rule_of(request)
        kept = rule.kept_of_prompt(prompt, shared)[self._tier]
        compaction.first = shared // self.block_size
        num_needed = 0
        if kept < prompt:
            num_needed = cdiv(kept, self.block_size) - compaction.first
        num_in_place = max(0, num_needed - len(compaction.new))
        blocks, surplus = self.req_to_blocks[req_id], len(compaction.in_place)
        for i in compaction.in_place[: surplus - num_in_place]:
            del self._written[blocks[i].block_id]
        compaction.in_place = compaction.in_place[surplus - num_in_place :]
        gone = compaction.new[num_needed - num_in_place :]
        compaction.new = compaction.new[: num_needed - num_in_place]
        if kept == prompt:
            del self._compactions[req_id]
        return gone

    def gather_pages(self, request: Request) -> Gathered | None:
        """Settle into which pages a prompt's kept tokens are gathered; ``truncate``
        makes them its block table.

        Call it after ``schedule()`` has returned, when every request of the step has
        its pages. Free pages then replace pages that would leave the prefix cache, but
        no page goes that a request has hit.

        Returns:
            None: kept tokens lie in the request's first own pages, which no other
            request reads.
        """
        compaction = self._compactions.get(request.request_id)
        if compaction is None:
            return None
        blocks, first = self.req_to_blocks[request.request_id], compaction.first
        written = []
        # The first pages first: a page can only be hit if all before it are.
        for i in compaction.in_place:
            del self._written[blocks[i].block_id]
            page = None
            if blocks[i].block_hash is not None:
                page = self._expendable_page()
                if page is None:
                    self.block_pool.evict_blocks({blocks[i].block_id})
            if page is None:
                written.append(i)
            else:
                compaction.new.append(page)
        compaction.in_place = written
        in_order = written == list(range(first, first + len(written)))
        if in_order and not compaction.new:
            del self._compactions[request.request_id]
            return None
        pages = [blocks[i] for i in written] + compaction.new
        return Gathered(tuple(page.block_id for page in pages), in_order)

    def _expendable_page(self) -> KVCacheBlock | None:
        """The free page that vLLM would use next, unless it holds what was hit."""
        pool = self.block_pool
        if not pool.get_num_free_blocks():
            return None
        page = pool.free_block_queue.fake_free_list_head.next_free_block
        was_hit = page.block_hash and self.lengths.hits.get(page.block_id)
        if was_hit and was_hit == page.block_hash:
            return None
        return pool.get_new_blocks(1)[0]

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
            written = [held[i] for i in compaction.in_place]
            kept = held[: compaction.first] + written + compaction.new
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
