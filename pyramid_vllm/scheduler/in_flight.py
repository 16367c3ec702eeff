"""Limits of how many prompts are in the middle, and of what a step scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from pyramid_vllm.limits import PromptLimits
    from pyramid_vllm.scheduler.lengths import TierLengths


class PromptsInFlight:
    """Prompts that evict tokens, from their first chunk to their last.

    Workers hold the queries of such prompts, and score all that they hold: their
    buffers are sized by the same limits.

    Args:
        limits: of the engine.
        lengths: of its requests.
    """

    def __init__(self, limits: PromptLimits, lengths: TierLengths) -> None:
        self._limits, self._lengths = limits, lengths
        self._cut: set[str] = set()
        self._num_admitted = 0
        """Tokens that may be evicted, of the prompts that this step has begun."""

    def __len__(self) -> int:
        """Prompts that are computed in part."""
        return len(self._cut)

    def begin_step(self) -> None:
        """Count what a step begins afresh."""
        self._num_admitted = 0

    def admits(self, request: Request, end: int) -> bool:
        """Whether a waiting request may begin.

        One that may not waits for prompts before it, which run on their own.

        Args:
            request: it waits.
            end: tokens that it would have computed after the step.
        """
        if not self._evicts(request):
            return True
        if end < request.num_prompt_tokens and len(self._cut) >= self._limits.max_cut:
            return False
        num_own = end - self._lengths.shared(request)
        num_admitted = self._num_admitted
        return not num_admitted or num_admitted + num_own <= self._limits.max_admitted

    def follow(self, request: Request, end: int, is_new: bool) -> None:
        """Note a chunk that is scheduled: arguments as of ``admits``."""
        if end >= request.num_prompt_tokens:
            self._cut.discard(request.request_id)
        elif is_new and self._evicts(request):
            self._cut.add(request.request_id)
        if is_new and self._evicts(request):
            num_tokens = min(end, request.num_prompt_tokens)
            self._num_admitted += num_tokens - self._lengths.shared(request)

    def drop(self, req_id: str) -> None:
        """Forget a request that finished or was preempted."""
        self._cut.discard(req_id)

    def _evicts(self, request: Request) -> bool:
        num_tokens = request.num_prompt_tokens
        rule = self._lengths.rule_of(request)
        if rule.config.segments:
            return False  # of a segment at a time, and no query waits for a chunk
        kept = rule.kept_of_prompt(num_tokens, self._lengths.shared(request))
        return min(kept) < num_tokens
