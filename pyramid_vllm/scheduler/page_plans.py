"""Where a step gathers what it keeps, and what it leaves in shared pages."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pyramid_vllm.scheduler.lengths import can_share
from pyramid_vllm.scheduler.windows import segment_window

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    from pyramid_vllm.plan import GeneratedWindow, PromptWindow
    from pyramid_vllm.scheduler.block_manager import Gathered, TierBlockManager
    from pyramid_vllm.scheduler.kv_manager import TierKVCacheManager

#: Waiting requests that are compared with a prompt that ends.
_NUM_NEXT = 64


class PagePlans:
    """Settles the pages of a step's compactions, after every request has its own.

    Args:
        pages: of all KV cache groups.
        managers: of the tiers, one for each of their groups.
    """

    def __init__(
        self, pages: TierKVCacheManager, managers: Sequence[TierBlockManager]
    ) -> None:
        self._pages, self._managers, self._lengths = pages, managers, pages.lengths

    def gathered(self, request: Request, window: PromptWindow) -> PromptWindow:
        """The window, with target pages if its prompt's pages are shared."""
        if window.num_kept is None or not self._pages.enable_caching:
            return window
        found: list[Gathered | None] = [None] * self._pages.num_kv_cache_groups
        for manager in self._managers:
            found[manager.kv_cache_group_id] = manager.gather_pages(request)
        if all(gathered is None for gathered in found):
            return window
        return replace(
            window,
            pages=tuple(gathered and gathered.pages for gathered in found),
            is_ordered=all(
                gathered is None or gathered.is_ordered for gathered in found
            ),
        )

    def segment(self, request: Request, segment: int) -> GeneratedWindow:
        """Plan a segment's compression: its pages may be in the prefix cache."""
        req_id, found = request.request_id, None
        if self._pages.enable_caching:
            found = self._pages.segments.find_segment(request, segment)
        pages: list[tuple[int, ...] | None] = [None] * self._pages.num_kv_cache_groups
        is_ordered = True
        for place, manager in enumerate(self._managers):
            group = manager.kv_cache_group_id
            if not manager.compacts(req_id):
                continue
            if found is not None:
                pages[group] = manager.share(req_id, found[place])
            else:
                gathered = manager.gather_pages(request)
                assert gathered is not None
                pages[group] = gathered.pages
                is_ordered &= gathered.is_ordered
        is_found = found is not None
        return segment_window(
            self._lengths, request, segment, tuple(pages), is_found, is_ordered
        )

    def keep_shared(
        self,
        request: Request,
        waiting: Iterable[Request],
        holds: Callable[[int], bool],
    ) -> bool:
        """Leave whole what other requests have got of a prompt that ends now, or will
        get as soon as they are admitted.

        Args:
            request: its computed tokens include the step's.
            waiting: requests that wait, the next ones first.
            holds: whether the whole pool can hold the request, if so many of its tokens
                stay whole.

        Returns:
            Whether more of it stays whole than was thought before.
        """
        is_cut = request.num_computed_tokens < request.num_prompt_tokens
        evicts_once = can_share(self._lengths.rule_of(request))
        if is_cut or not (evicts_once and self._pages.enable_caching):
            return False
        num_tokens = max(
            self._num_awaited(request, waiting),
            min(m.num_others_read(request.request_id) for m in self._managers),
        )
        if not (holds(num_tokens) and self._lengths.note_sharers(request, num_tokens)):
            return False
        for manager in self._managers:
            gone = manager.keep_shared(request)
            self._pages.block_pool.free_blocks(gone)
        return True

    def _num_awaited(self, request: Request, waiting: Iterable[Request]) -> int:
        """First tokens of a prompt, in whole pages, with which two of the next waiting
        requests begin, too: a single one may be the next turn of a chat, which waits
        until this one has ended."""
        first, second = 0, 0
        for other in itertools.islice(waiting, _NUM_NEXT):
            count = _num_equal(request.block_hashes, other.block_hashes)
            first, second = max(first, count), max(second, min(first, count))
        num_tokens = second * self._pages.block_pool.hash_block_size
        return num_tokens - num_tokens % self._managers[0].block_size


def _num_equal(hashes: Sequence[BlockHash], others: Sequence[BlockHash]) -> int:
    """How many hashes two requests begin with."""
    # A hash is of all tokens before it: those that differ come last.
    return bisect.bisect_left(
        range(min(len(hashes), len(others))),
        True,
        key=lambda place: hashes[place] != others[place],
    )
