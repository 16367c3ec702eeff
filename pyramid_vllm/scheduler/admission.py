"""Pages that an admitted request must leave free for running requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from vllm.utils.math_utils import cdiv

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from pyramid_vllm.scheduler.block_manager import TierBlockManager
    from pyramid_vllm.scheduler.lengths import TierLengths

Lengths = tuple[int, ...]
Ints = npt.NDArray[np.int64]


class GrowthReserve:
    """Pages that running requests will still need, for the admission gate.

    Stock vLLM admits a request as soon as its prompt fits, and preempts when outputs
    outgrow the pool. More sequences in the same pool would be preempted more often.
    This gate admits a request if its prompt's peak fits now, and if all requests still
    fit after each has generated ``growth`` more tokens. A request that has little to
    compute, because it is short or the prefix cache has most of it, is admitted as in
    stock vLLM.

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
        self._block_size = managers[0].block_size
        tiers = [manager.kv_cache_spec.tier for manager in managers]
        self._groups_per_tier = np.bincount(tiers)
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

    def num_pages(self, request: Request, num_free: int, num_hit: int = 0) -> int:
        """Pages that must stay free in addition to the peak of a request's prompt.

        Args:
            request: the waiting request.
            num_free: free pages of the pool.
            num_hit: pages of each KV cache group that it gets from the prefix cache.
        """
        if self._growth == 0 or not self._running:
            return 0  # a request that runs alone may take the whole pool
        num_own = request.num_tokens - num_hit * self._block_size
        is_short = num_own <= self._lengths.rule_of(request).config.min_context
        if is_short and self._growth is not None:
            # As in stock vLLM, like everything of such a request: if it is preempted,
            # which the newest is, little has to be computed again.
            return 0
        peak = self._pages(self._lengths.peaks(request, request.num_tokens))
        if peak - num_hit * len(self._managers) > num_free:
            return 0  # the request does not fit anyway: the usual case in a full pool
        self._count(self._running[self._num_counted :])
        self._num_counted = len(self._running)
        end = self._pages(self._held_later(request))
        return max(self._soon, end + self._later - peak, 0)

    def _count(self, running: Sequence[Request]) -> None:
        """Add what running requests still need."""
        decoding = []
        for request in running:
            in_prompt = request.num_computed_tokens < request.num_prompt_tokens
            if in_prompt or self._lengths.rule_of(request).compresses_output:
                held = self._num_held(request)
                self._soon += max(0, self._pages(self._soon_held(request)) - held)
                self._later += self._pages(self._held_later(request)) - held
            else:
                decoding.append(request)
        if decoding:
            self._count_decoding(decoding)

    def _count_decoding(self, requests: Sequence[Request]) -> None:
        """Add what requests need from which nothing more is evicted."""
        prompt = np.array([r.num_prompt_tokens for r in requests])
        tokens = np.array([r.num_tokens for r in requests])
        limit = prompt + [r.max_tokens for r in requests]
        gone = np.array([self._lengths.evicted(r.request_id) for r in requests])
        held = np.array([self._num_held(r) for r in requests])
        soon = self._pages_of(tokens + self._num_prompt_steps, limit, gone)
        later = self._pages_of(self._reserved_end(tokens, prompt, limit), limit, gone)
        self._soon += int(np.maximum(0, soon - held).sum())
        self._later += int((later - held).sum())

    def _reserved_end(self, tokens: Ints, prompt: Ints, limit: Ints) -> Ints:
        """Tokens of requests once they have generated their reserve."""
        start = np.maximum(prompt, tokens)
        if self._growth is None:
            return limit
        # A low `max_tokens` predicts the output's length; a high one does not.
        return np.where(limit - start > 2 * self._growth, start + self._growth, limit)

    def _pages_of(self, tokens: Ints, limit: Ints, gone: Ints) -> Ints:
        """``[num_requests]``: pages for ``tokens``, of which ``gone`` are evicted."""
        ends = np.minimum(np.minimum(tokens, limit), self._max_model_len)
        pages = -(-(ends[:, None] - gone) // self._block_size)
        of_all: Ints = pages @ self._groups_per_tier
        return of_all

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
        prompt, tokens = np.array([[request.num_prompt_tokens], [request.num_tokens]])
        end = self._reserved_end(tokens, prompt, prompt + request.max_tokens)
        return self._held(request, int(end[0]))

    def _held(self, request: Request, num_tokens: int) -> Lengths:
        prompt = request.num_prompt_tokens
        end = min(num_tokens, prompt + request.max_tokens, self._max_model_len)
        rule, num_shared = self._lengths.rule_of(request), self._lengths.shared(request)
        return rule.generation_peak(prompt, end, num_shared)

    def _pages(self, lengths: Lengths) -> int:
        return sum(
            cdiv(lengths[manager.kv_cache_spec.tier], manager.block_size)
            for manager in self._managers
        )
