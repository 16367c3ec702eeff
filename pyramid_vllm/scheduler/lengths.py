"""How many tokens each running request holds in each tier."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pyramid_vllm.policy import LengthRule

Counts = tuple[int, ...]


class RequestLengths(Protocol):
    """What is read of vLLM's requests."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    sampling_params: Any


def needs_all_rows(request: RequestLengths) -> bool:
    """Whether a request's output depends on every row of its prompt."""
    sampling = request.sampling_params
    return sampling is not None and sampling.prompt_logprobs is not None


class TierLengths:
    """The one record of evicted tokens; block managers and the plan read it.

    Args:
        rule: the policy's counts.
        max_chunk: most prompt tokens that one step computes.
        requests: the scheduler's requests.
    """

    def __init__(
        self, rule: LengthRule, max_chunk: int, requests: Mapping[str, RequestLengths]
    ) -> None:
        self.rule = rule
        self.max_chunk = max_chunk
        self.max_unpruned_chunk = max_chunk
        """The same for a request whose rows are not pruned; set by the scheduler."""
        self._requests = requests
        self._none = (0,) * rule.layout.num_tiers
        self._evicted: dict[str, Counts] = {}
        self._last_slots: tuple[tuple[str, int, int], Counts] | None = None
        self._last_peak: tuple[tuple[str, int], Counts] | None = None

    def __len__(self) -> int:
        """Requests that have evicted tokens."""
        return len(self._evicted)

    def evicted(self, req_id: str) -> Counts:
        """Computed tokens minus cache length, per tier."""
        return self._evicted.get(req_id, self._none)

    def evicted_rows(self, req_ids: list[str]) -> npt.NDArray[np.int32]:
        """``[len(req_ids), num_tiers]``: the evicted tokens of several requests."""
        rows = np.zeros((len(req_ids), len(self._none)), dtype=np.int32)
        if self._evicted:
            for row, req_id in enumerate(req_ids):
                if (counts := self._evicted.get(req_id)) is not None:
                    rows[row] = counts
        return rows

    def rows(
        self, request: RequestLengths, num_before: int, num_after: int
    ) -> Counts | None:
        """Rows that each tier computes of a request's step; None: all of them."""
        rule = self.rule
        if (
            not rule.prunes
            or num_before >= request.num_prompt_tokens
            or needs_all_rows(request)
        ):
            return None
        rows = rule.num_rows(num_before, min(num_after, request.num_prompt_tokens))
        return rows if rows[-1] < num_after - num_before else None

    def slots(self, req_id: str, num_tokens: int, tier: int) -> int:
        """Tokens that a tier holds while the step that computes up to ``num_tokens``
        runs, before it evicts any."""
        request = self._requests[req_id]
        computed = request.num_computed_tokens
        if computed >= request.num_prompt_tokens or not self.rule.prunes:
            return num_tokens - self.evicted(req_id)[tier]
        key = (req_id, computed, num_tokens)
        # Every tier's manager asks, one after the other and several times.
        if self._last_slots is None or self._last_slots[0] != key:
            rows = self.rows(request, computed, num_tokens)
            scheduled = num_tokens - computed
            slots = tuple(
                computed - evicted + (scheduled if rows is None else rows[i])
                for i, evicted in enumerate(self.evicted(req_id))
            )
            self._last_slots = key, slots
        return self._last_slots[1][tier]

    def peak(self, req_id: str, num_tokens: int, tier: int) -> int:
        """Most tokens a tier holds on the way to ``num_tokens`` computed ones."""
        key = (req_id, num_tokens)
        # As in `slots`, every tier asks.
        if self._last_peak is None or self._last_peak[0] != key:
            request = self._requests[req_id]
            pruned = not needs_all_rows(request)
            lengths = self.rule.peak_lengths(
                request.num_prompt_tokens,
                num_tokens,
                self.max_chunk if pruned else self.max_unpruned_chunk,
                pruned,
            )
            self._last_peak = key, lengths
        return self._last_peak[1][tier]

    def advance(
        self, req_id: str, num_prompt_tokens: int, num_computed_tokens: int
    ) -> Counts | None:
        """Evict what the rule says once a request's step is over.

        Returns:
            Cache lengths after the step, or None where nothing is evicted.
        """
        kept = self.rule.held_lengths(num_prompt_tokens, num_computed_tokens)
        evicted = tuple(num_computed_tokens - length for length in kept)
        self._last_slots = None
        if evicted == self.evicted(req_id):
            return None
        self._evicted[req_id] = evicted
        return kept

    def forget(self, req_id: str) -> None:
        """Drop a request that holds no pages any more."""
        self._evicted.pop(req_id, None)
        self._last_slots = self._last_peak = None
