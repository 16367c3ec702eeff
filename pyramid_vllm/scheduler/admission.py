"""Pages that an admitted request must leave free for running requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from pyramid_vllm.scheduler.block_manager import TierBlockManager
    from pyramid_vllm.scheduler.lengths import TierLengths

Lengths = tuple[int, ...]


class GrowthReserve:
    """Pages that running requests will still need, for the admission gate.

    Stock vLLM admits a request as soon as its prompt fits, and preempts when outputs
    outgrow the pool. More sequences in the same pool would be preempted more often.
    This gate admits a request if its prompt's peak fits now, and if all requests still
    fit after each has generated ``growth`` more tokens.

    Args:
        growth: generated tokens to reserve for each sequence. A sequence that can
            generate at most twice as many reserves all of them. None: always all.
        max_model_len: longest sequence.
        max_chunk: most prompt tokens of a step.
        lengths: cached tokens of requests.
        managers: the tiers' block managers.
    """

    def __init__(
        self,
        growth: int | None,
        max_model_len: int,
        max_chunk: int,
        lengths: TierLengths,
        managers: Sequence[TierBlockManager],
    ) -> None:
        self._growth = growth
        self._max_model_len = max_model_len
        self._num_prompt_steps = cdiv(max_model_len, max_chunk)
        self._lengths = lengths
        self._managers = managers
        self._running: list[Request] = []
        self._num_counted = 0
        self._soon = self._later = 0

    def begin(self, running: list[Request]) -> None:
        """Start a step.

        Args:
            running: the scheduler's list, to which it appends requests that it admits.
        """
        self._running = running
        self._num_counted = self._soon = self._later = 0

    def num_pages(self, request: Request, num_free: int) -> int:
        """Pages that must stay free in addition to the peak of a request's prompt.

        Args:
            request: the waiting request.
            num_free: free pages of the pool.
        """
        if self._growth == 0 or not self._running:
            return 0  # a request that runs alone may take the whole pool
        peak = self._pages(self._lengths.peaks(request, request.num_tokens))
        if peak > num_free:
            return 0  # the request does not fit anyway: the usual case in a full pool
        for running in self._running[self._num_counted :]:
            held = self._num_held(running)
            self._soon += max(0, self._pages(self._soon_held(running)) - held)
            self._later += self._pages(self._held_later(running)) - held
        self._num_counted = len(self._running)
        end = self._pages(self._held_later(request))
        return max(self._soon, end + self._later - peak, 0)

    def _num_held(self, request: Request) -> int:
        req_id = request.request_id
        return sum(len(m.req_to_blocks.get(req_id, ())) for m in self._managers)

    def _soon_held(self, request: Request) -> Lengths:
        """Most tokens that a running request holds while another prompt is computed."""
        if request.num_computed_tokens < request.num_prompt_tokens:
            return self._lengths.peaks(request, request.num_prompt_tokens)
        return self._held(request, request.num_tokens + self._num_prompt_steps)

    def _held_later(self, request: Request) -> Lengths:
        """Tokens that a request holds once it has generated its reserve."""
        start = max(request.num_prompt_tokens, request.num_tokens)
        rest = request.num_prompt_tokens + request.max_tokens - start
        # A low `max_tokens` predicts the output's length; a high one does not.
        if self._growth is not None and rest > 2 * self._growth:
            rest = self._growth
        return self._held(request, start + rest)

    def _held(self, request: Request, num_tokens: int) -> Lengths:
        prompt = request.num_prompt_tokens
        end = min(num_tokens, prompt + request.max_tokens, self._max_model_len)
        rule = self._lengths.rule_of(request)
        if request.num_computed_tokens >= prompt and not rule.config.generation:
            # Nothing more is evicted, and this is faster than the rule.
            evicted = self._lengths.evicted(request.request_id)
            return tuple(end - gone for gone in evicted)
        return rule.generation_peak(prompt, end)

    def _pages(self, lengths: Lengths) -> int:
        return sum(
            cdiv(lengths[manager.kv_cache_spec.tier], manager.block_size)
            for manager in self._managers
        )
