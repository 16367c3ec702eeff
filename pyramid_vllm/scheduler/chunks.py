"""Ends of chunks, so that a replay computes what was computed at first."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from pyramid_vllm.scheduler.lengths import can_share, needs_all_rows
from pyramid_vllm.scheduler.windows import to_next_group

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from pyramid_vllm.scheduler.lengths import TierLengths


class ChunkEnds:
    """Ends chunks at points of eviction.

    Args:
        lengths: cached tokens of requests.
    """

    def __init__(self, lengths: TierLengths) -> None:
        self._lengths = lengths
        self._noted: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()
        """Chunk ends of prompts whose eviction depends on them."""

    def note(self, request: Request) -> None:
        """Record the end of a prompt's chunk, if eviction depends on it.

        Args:
            request: its computed tokens include the chunk.
        """
        rule = self._lengths.rule_of(request)
        if can_share(rule) or rule.config.segments:
            return
        ends = self._noted.setdefault(request, [])
        if not ends or request.num_computed_tokens > ends[-1]:
            ends.append(request.num_computed_tokens)

    def limit(self, request: Request, num_computed: int, num_new: int) -> int:
        """Number of tokens, at most ``num_new``, up to the next end of a chunk.

        A chunk may not cross a recorded end, the prompt's end, or a compression of
        generated tokens, if tokens are evicted there. Only the replay of a preempted
        request would cross these.
        """
        if num_computed + num_new > request.num_tokens:
            return num_new  # a last token with drafts after it
        rule = self._lengths.rule_of(request)
        if rule.config.segments:
            # A later token must not attend to what is due to be evicted.
            segments = rule.segments
            if segments is None:
                return num_new
            return min(num_new, segments.next_end(num_computed) - num_computed)
        num_prompt = request.num_prompt_tokens
        if num_computed < num_prompt:
            if rule.prunes and needs_all_rows(request):
                num_new = min(num_new, self._lengths.max_unpruned_chunk)
            # What is evicted never comes back: this covers all ends before it too.
            end = max(num_prompt, num_computed + num_new)
            shared = self._lengths.shared(request)
            if min(rule.held_lengths(num_prompt, end, shared)) == end:
                return num_new
            later = (e for e in self._noted.get(request, ()) if e > num_computed)
            return min(num_new, min(next(later, num_prompt), num_prompt) - num_computed)
        if num_new > 1 and rule.config.generation:
            return to_next_group(rule, request, num_computed, num_new)
        return num_new
