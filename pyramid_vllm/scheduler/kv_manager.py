"""vLLM's KV cache manager, with a short way for requests that need nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheManager

from pyramid_vllm.scheduler.block_manager import TierBlockManager
from pyramid_vllm.scheduler.segments import SegmentCache

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from pyramid_vllm.scheduler.in_flight import PromptsInFlight
    from pyramid_vllm.scheduler.lengths import TierLengths


class TierKVCacheManager(KVCacheManager):
    """Looks once where stock vLLM asks every KV cache group.

    A generating request needs new pages, or offers a page to the prefix cache, in few
    of its steps. ``_rests_until`` holds the number of computed tokens up to which a
    request needs neither, in any tier.
    """

    lengths: TierLengths
    in_flight: PromptsInFlight
    segments: SegmentCache
    due: dict[str, int]
    """By request: the segment that this step compresses."""
    begun: dict[str, tuple[int, ...]]
    """Evicted tokens, by tier, of requests that this step begins with compressed
    segments of the prefix cache."""
    _rests_until: dict[str, int]

    @classmethod
    def adopt(
        cls,
        manager: KVCacheManager,
        tiers: Sequence[TierBlockManager],
        lengths: TierLengths,
        in_flight: PromptsInFlight,
    ) -> TierKVCacheManager:
        """Make a scheduler's manager one of this class.

        vLLM's scheduler builds its manager itself and has no hook for another class.
        """
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager.lengths, manager._rests_until = lengths, {}
        manager.in_flight, manager.due, manager.begun = in_flight, {}, {}
        manager.segments = SegmentCache(manager.coordinator, tiers, lengths)
        for of_tier in tiers:
            of_tier.lengths, of_tier.offer = lengths, manager.segments.offer
        return manager

    def begin_step(self) -> None:
        """Forget what the step before has begun and compressed."""
        self.in_flight.begin_step()
        self.due.clear()
        self.begun.clear()

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """See the stock method."""
        req_id = request.request_id
        end = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        # A step may need no slots and yet take pages of a prefix hit.
        if end <= self._rests_until.get(req_id, -1):
            return self.empty_kv_cache_blocks
        end, is_new = end + num_new_computed_tokens, not request.num_computed_tokens
        if is_new and not self.in_flight.admits(request, end):
            return None
        allocated = super().allocate_slots(
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            *args,
            **kwargs,
        )
        if allocated is not None:
            self.in_flight.follow(request, end, is_new)
            if is_new and self.lengths.admit(req_id):
                self.begun[req_id] = self.lengths.evicted(req_id)
            due = self.lengths.due(req_id, end - num_lookahead_tokens)
            if due is not None:
                self.due[req_id] = due[0]
        if (
            allocated is not None
            and request.num_computed_tokens >= request.num_prompt_tokens
        ):
            self._rests_until[req_id] = self._next_need(request) - 1
        return allocated

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """See the stock method; a request may hit compressed segments."""
        compresses = self.lengths.rule_of(request).segments is not None
        if not (compresses and self.prefix_cache_lookup_enabled(request)):
            return super().get_computed_blocks(request)
        # The last token is computed in any case, for its logits.
        hit = self.segments.find(request, request.num_tokens - 1)
        return self.create_kv_cache_blocks(hit.pages), hit.num_tokens, 0

    def _next_need(self, request: Request) -> int:
        """Number of computed tokens with which a request needs its managers again."""
        req_id, needs = request.request_id, []
        evicted = self.lengths.evicted(req_id)
        segments = self.lengths.segments_of(req_id)
        if segments is not None:
            needs.append(segments.next_end(request.num_computed_tokens))
        shares = self.enable_caching and self.lengths.shares(request)
        for manager in self.coordinator.single_type_managers:
            size, gone = manager.block_size, 0
            room = len(manager.req_to_blocks[req_id]) * size
            if isinstance(manager, TierBlockManager):
                gone = evicted[manager.kv_cache_spec.tier]
                needs.append(room + gone + 1)
                if not shares:
                    continue
            else:
                needs.append(room + 1)
                computed = request.num_computed_tokens - request.num_in_flight_tokens
                skipped = manager.get_num_skipped_tokens(max(0, computed))
                needs.append(max(0, computed) + size - skipped % size)
            if self.enable_caching:
                num_cached = manager.num_cached_block.get(req_id, 0)
                needs.append((num_cached + 1) * size + gone)
        return min(needs)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """See the stock method; a request whose pages may be written offers none."""
        if num_computed_tokens > self._rests_until.get(request.request_id, 0):
            super().cache_blocks(request, num_computed_tokens)

    def free(self, request: Request) -> None:
        """Free a request's pages, the last tokens' first, as stock vLLM does."""
        self.block_pool.free_blocks(reversed(self.pop_blocks_for_free(request)))

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """Release a request's pages, in the order of their tokens."""
        self.in_flight.drop(request.request_id)
        self.due.pop(request.request_id, None)
        self.begun.pop(request.request_id, None)
        self._rests_until.pop(request.request_id, None)
        return by_position(
            manager.pop_blocks_for_free(request.request_id)
            for manager in self.coordinator.single_type_managers
        )

    def truncate(self, request_id: str, num_held: Sequence[int]) -> list[int]:
        """Free the pages that a request's cached tokens do not need.

        Args:
            request_id: the request.
            num_held: tokens that stay, by tier.

        Returns:
            By tier: how many pages the request has fewer.
        """
        self._rests_until.pop(request_id, None)
        tables, num_freed = [], [0] * len(num_held)
        for manager in self.coordinator.single_type_managers:
            if isinstance(manager, TierBlockManager):
                tier = manager.kv_cache_spec.tier
                before = len(manager.req_to_blocks[request_id])
                tables.append(manager.truncate(request_id, num_held[tier]))
                num_freed[tier] += before - len(manager.req_to_blocks[request_id])
        self.block_pool.free_blocks(reversed(by_position(tables)))
        return num_freed


def by_position(tables: Iterable[Sequence[KVCacheBlock]]) -> list[KVCacheBlock]:
    """The pages of several block tables, in the order of their tokens.

    A hit needs the pages of all tiers, so that pages that leave the prefix cache table
    by table would take whole prompts with them.
    """
    places = itertools.zip_longest(*tables)
    return [block for place in places for block in place if block is not None]
