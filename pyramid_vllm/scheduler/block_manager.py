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


class _Target(NamedTuple):
    """What a step replaces in a request's block table."""

    first: int
    """Place of the first page that is replaced."""
    num_replaced: int | None
    """How many are; None: all from there on."""
    num_pages: int
    """Pages that replace them."""

    def replaced(self, blocks: Sequence[KVCacheBlock]) -> Sequence[KVCacheBlock]:
        """Those pages of a block table."""
        end = len(blocks) if self.num_replaced is None else self.end
        return blocks[self.first : end]

    @property
    def end(self) -> int:
        """The place after them."""
        assert self.num_replaced is not None
        return self.first + self.num_replaced


@dataclass
class _Compaction:
    """Pages for the kept tokens of a prompt, or of a segment, secured when the last
    chunk is scheduled."""

    target: _Target
    in_place: list[int]
    """Places, in the block table, of pages that only this request reads, ascending; the
    last ones, because the first are the likeliest to be hit. New pages may replace them
    until the end of ``schedule()``."""
    new: list[KVCacheBlock]
    """Pages that the request takes in addition."""
    found: list[KVCacheBlock] | None = None
    """Pages of the prefix cache that hold the kept tokens: nothing is written."""


class Gathered(NamedTuple):
    """Where a prompt's or a segment's kept tokens are gathered."""

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

    ``lengths``, ``offer`` and ``reserve`` are set by the scheduler, before the first
    request.
    """

    lengths: TierLengths
    reserve: Callable[[Request, int, int], int] | None = None
    """Pages to leave free when a request is admitted; set on one manager only."""
    offer: Callable[[Request, int, int, Sequence[KVCacheBlock]], None]
    """Lets later requests find a segment's pages: ``SegmentCache.offer``."""
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
        segments = self.lengths.segments_of(request_id)
        if segments is not None and apply_admission_cap:
            # Its first segment may lie in pages that others read.
            kept = segments.kept[self._tier] // self.block_size
            return num_blocks + (kept if new_computed_blocks else 0)
        target = self._target(request_id, num_tokens_main_model)
        if target is not None:
            held = self.req_to_blocks.get(request_id)
            # The request adds a reference to the pages that it hits now.
            num_others, blocks = (1, held) if held else (0, new_computed_blocks)
            replaced = target.replaced(blocks)
            num_shared = sum(block.ref_cnt > num_others for block in replaced)
            num_replaced = target.num_replaced
            if num_replaced is None:
                num_replaced = cdiv(num_slots, self.block_size) - target.first
            num_blocks += max(0, target.num_pages - (num_replaced - num_shared))
        return num_blocks

    def _target(self, request_id: str, num_tokens: int) -> _Target | None:
        """What a step up to ``num_tokens`` gathers kept tokens into; None: it gathers
        nothing that others may read."""
        due = self.lengths.due(request_id, num_tokens)
        if due is not None:
            segment, segments = due
            kept = segments.kept[self._tier] // self.block_size
            size = segments.size // self.block_size
            return _Target(segment * kept, size, kept) if kept < size else None
        if not self.enable_caching:
            return None
        kept = self.lengths.kept_of_prompt(request_id, num_tokens)
        request = self.lengths.request(request_id)
        if kept is None or kept[self._tier] == request.num_prompt_tokens:
            return None
        first = self.lengths.shared(request) // self.block_size
        num_pages = cdiv(kept[self._tier], self.block_size) - first
        return _Target(first, None, num_pages)

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
            self._secure(request_id, target)
        return new

    def _secure(self, request_id: str, target: _Target) -> None:
        """Choose pages that a compaction can write in any case."""
        replaced = target.replaced(self.req_to_blocks[request_id])
        own = [i for i, block in enumerate(replaced) if block.ref_cnt == 1]
        own = own[max(0, len(own) - target.num_pages) :]
        if not self.enable_caching:
            own = list(range(target.num_pages))  # nobody else reads any of them
        for i in own:
            self._written[replaced[i].block_id] = request_id, target.first + i
        new = self.block_pool.get_new_blocks(target.num_pages - len(own))
        in_place = [target.first + i for i in own]
        self._compactions[request_id] = _Compaction(target, in_place, new)

    def cache_blocks(
        self, request: Request, num_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Offer full pages to other requests, until the request evicts tokens."""
        num_tokens = self.lengths.num_shareable(request, num_tokens)
        num_gone = self.lengths.evicted(request.request_id)[self._tier]
        if not num_gone:
            if num_tokens:
                super().cache_blocks(request, num_tokens, *args, **kwargs)
            return
        # Whole segments are gone: the hash of a page is that of its first place.
        num_gone //= self.block_size
        req_id = request.request_id
        num_cached = self.num_cached_block.get(req_id, 0)
        num_full = num_tokens // self.block_size - num_gone
        if num_full <= num_cached:
            return
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=_Shifted(self.req_to_blocks[req_id], num_gone),
            num_cached_blocks=num_cached + num_gone,
            num_full_blocks=num_full + num_gone,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[req_id] = num_full

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

    def compacts(self, request_id: str) -> bool:
        """Whether this step compacts a request's pages in this group."""
        return request_id in self._compactions

    def share(self, request_id: str, pages: list[KVCacheBlock]) -> tuple[int, ...]:
        """Take a segment's pages from the prefix cache instead of gathering its tokens;
        ``truncate`` puts them into the block table.

        Returns:
            Ids of the request's pages from the segment's first on.
        """
        compaction = self._compactions[request_id]
        blocks, target = self.req_to_blocks[request_id], compaction.target
        for i in compaction.in_place:
            del self._written[blocks[i].block_id]
        self.block_pool.touch(pages)
        compaction.in_place, compaction.found = [], pages
        for page in pages:
            self.lengths.hits[page.block_id] = page.block_hash
        return tuple(page.block_id for page in (*pages, *blocks[target.end :]))

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
        first, num_needed = shared // self.block_size, 0
        if kept < prompt:
            num_needed = cdiv(kept, self.block_size) - first
        compaction.target = _Target(first, None, num_needed)
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
        """Settle into which pages kept tokens are gathered; ``truncate`` makes them the
        request's block table.

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
        blocks, target = self.req_to_blocks[request.request_id], compaction.target
        first, written = target.first, []
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
        pages = [blocks[i] for i in written] + compaction.new
        if target.num_replaced is not None:
            if self.enable_caching:
                segment = target.first // target.num_pages
                self.offer(request, segment, self.kv_cache_group_id, pages)
            pages += blocks[target.end :]
        elif in_order and not compaction.new:
            del self._compactions[request.request_id]
            return None
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
        compaction = self._compactions.pop(request_id, None)
        if compaction is None:
            kept = held[: cdiv(num_held, self.block_size)]
        else:
            target, kept = compaction.target, held[: compaction.target.first]
            kept += compaction.found or []
            kept += [held[i] for i in compaction.in_place]
            if compaction.found is None:
                kept += compaction.new
            if target.num_replaced is not None:
                kept += held[target.end :]
                cached = self.num_cached_block.get(request_id)
                if cached is not None:
                    fewer = target.num_replaced - target.num_pages
                    self.num_cached_block[request_id] = cached - fewer
        self.req_to_blocks[request_id] = kept
        stays = {block.block_id for block in kept}
        gone = [block for block in held if block.block_id not in stays]
        if compaction is not None and compaction.found is not None:
            gone += compaction.new
        return gone

    def check_settled(self) -> None:
        """Check that no secured pages outlive their step.

        Raises:
            AssertionError: names the requests.
        """
        assert not self._compactions, f"secured: {list(self._compactions)}"
        assert not self._written, f"written: {list(self._written.values())}"
        assert not self._lost, f"lost: {self._lost}"


class _Shifted(Sequence["KVCacheBlock"]):
    """A block table whose places are those before its first segments were compressed.

    Args:
        blocks: the table.
        shift: pages that are gone from before all places that are asked for.
    """

    def __init__(self, blocks: list[KVCacheBlock], shift: int) -> None:
        self._blocks, self._shift = blocks, shift

    def __len__(self) -> int:
        return len(self._blocks) + self._shift

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            start, stop = place.start - self._shift, place.stop - self._shift
            return self._blocks[start:stop]
        return self._blocks[place - self._shift]


def register_spec(vllm_config: VllmConfig | None) -> None:
    """Register the manager of tiers with vLLM. Idempotent."""
    # vLLM fills the registry only while it is empty, so its specs come first.
    register_all_kvcache_specs(vllm_config)
    KVCacheSpecRegistry.register(TierAttentionSpec, manager_class=TierBlockManager)
