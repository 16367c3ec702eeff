"""vLLM's KV cache manager, with a short way for requests that need nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheManager

from pyramid_vllm.scheduler.block_manager import TierBlockManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

    from pyramid_vllm.scheduler.lengths import TierLengths


class TierKVCacheManager(KVCacheManager):
    """Looks once where stock vLLM asks every KV cache group.

    A generating request needs new pages, or offers a page to the prefix cache, in few
    of its steps. ``_rests_until`` holds the number of computed tokens up to which a
    request needs neither, in any tier.
    """

    lengths: TierLengths
    _rests_until: dict[str, int]

    @classmethod
    def adopt(cls, manager: KVCacheManager, lengths: TierLengths) -> TierKVCacheManager:
        """Make a scheduler's manager one of this class.

        vLLM's scheduler builds its manager itself and has no hook for another class.
        """
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager.lengths, manager._rests_until = lengths, {}
        return manager

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
        allocated = super().allocate_slots(
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            *args,
            **kwargs,
        )
        if (
            allocated is not None
            and request.num_computed_tokens >= request.num_prompt_tokens
        ):
            self._rests_until[req_id] = self._next_need(request) - 1
        return allocated

    def _next_need(self, request: Request) -> int:
        """Number of computed tokens with which a request needs its managers again."""
        req_id, needs = request.request_id, []
        evicted = self.lengths.evicted(req_id)
        shares = self.enable_caching and self.lengths.shares(request)
        for manager in self.coordinator.single_type_managers:
            size = manager.block_size
            room = len(manager.req_to_blocks[req_id]) * size
            if isinstance(manager, TierBlockManager):
                needs.append(room + evicted[manager.kv_cache_spec.tier] + 1)
                if not shares:
                    continue
            else:
                needs.append(room + 1)
                computed = request.num_computed_tokens - request.num_in_flight_tokens
                skipped = manager.get_num_skipped_tokens(max(0, computed))
                needs.append(max(0, computed) + size - skipped % size)
            if self.enable_caching:
                needs.append((manager.num_cached_block.get(req_id, 0) + 1) * size)
        return min(needs)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """See the stock method; a request whose pages may be written offers none."""
        if num_computed_tokens > self._rests_until.get(request.request_id, 0):
            super().cache_blocks(request, num_computed_tokens)

    def wake(self, request_id: str) -> None:
        """Note that a request's pages or counts have changed."""
        self._rests_until.pop(request_id, None)

    def free(self, request: Request) -> None:
        """See the stock method."""
        self.wake(request.request_id)
        super().free(request)

    def pop_blocks_for_free(self, request: Request) -> Any:
        """See the stock method."""
        self.wake(request.request_id)
        return super().pop_blocks_for_free(request)
