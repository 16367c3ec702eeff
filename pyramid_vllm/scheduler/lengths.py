"""How many tokens each running request holds in each tier."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pyramid_vllm.policy import LengthRule

Counts = tuple[int, ...]


class TierLengths:
    """The one record of evicted tokens; block managers and the plan read it.

    Args:
        rule: the policy's counts.
        max_chunk: most prompt tokens that one step computes.
        num_prompt_tokens: prompt length of a request that the scheduler knows.
    """

    def __init__(
        self,
        rule: LengthRule,
        max_chunk: int,
        num_prompt_tokens: Callable[[str], int],
    ) -> None:
        self.rule = rule
        self._max_chunk = max_chunk
        self._num_prompt_tokens = num_prompt_tokens
        self._none = (0,) * rule.layout.num_tiers
        self._evicted: dict[str, Counts] = {}

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

    def peak(self, req_id: str, num_tokens: int, tier: int) -> int:
        """Most tokens a tier holds on the way to ``num_tokens`` computed ones."""
        prompt = self._num_prompt_tokens(req_id)
        return self.rule.peak_lengths(prompt, num_tokens, self._max_chunk)[tier]

    def advance(
        self, req_id: str, num_prompt_tokens: int, num_computed_tokens: int
    ) -> Counts | None:
        """Evict what the rule says once a prompt's step is over.

        Returns:
            Cache lengths after the step, or None where nothing is evicted.
        """
        kept = self.rule.held_lengths(num_prompt_tokens, num_computed_tokens)
        evicted = tuple(num_computed_tokens - length for length in kept)
        if evicted == self.evicted(req_id):
            return None
        self._evicted[req_id] = evicted
        return kept

    def forget(self, req_id: str) -> None:
        """Drop a request that holds no pages any more."""
        self._evicted.pop(req_id, None)
