"""Where a chunk has to end, for a replay to see what was seen at first."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from pyramid_vllm.scheduler.lengths import can_share, needs_all_rows
from pyramid_vllm.scheduler.windows import to_next_group

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from pyramid_vllm.scheduler.lengths import TierLengths


class ChunkEnds:
    """Ends chunks where tokens are to be evicted.

    Args:
        lengths: what requests hold.
    """

    def __init__(self, lengths: TierLengths) -> None:
        self._lengths = lengths
        self._noted: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()
        """Where prompts were cut whose eviction depends on it."""

    def note(self, request: Request) -> None:
        """Remember where a chunk of a prompt ended, if what is evicted depends on it.

        Args:
            request: with the chunk's tokens counted as computed.
        """
        if can_share(self._lengths.rule_of(request)):
            return
        ends = self._noted.setdefault(request, [])
        if not ends or request.num_computed_tokens > ends[-1]:
            ends.append(request.num_computed_tokens)

    def limit(self, request: Request, num_computed: int, num_new: int) -> int:
        """Of ``num_new`` tokens, those up to the next end.

        That is the prompt's end, before it where a chunk ended at first if that
        matters, and behind it wherever a group of generated tokens is compressed. Only
        the replay of a preempted request would go past these.
        """
        if num_computed + num_new > request.num_tokens:
            return num_new  # a last token with drafts behind it
        rule = self._lengths.rule_of(request)
        to_prompt_end = request.num_prompt_tokens - num_computed
        if to_prompt_end > 0:
            if rule.prunes and needs_all_rows(request):
                num_new = min(num_new, self._lengths.max_unpruned_chunk)
            behind = (e for e in self._noted.get(request, ()) if e > num_computed)
            to_chunk_end = next(behind, request.num_prompt_tokens) - num_computed
            return min(num_new, to_prompt_end, to_chunk_end)
        if num_new > 1 and rule.config.generation:
            return to_next_group(rule, request, num_computed, num_new)
        return num_new
