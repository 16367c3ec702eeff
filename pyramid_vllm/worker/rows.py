"""The rows of a step's batch, by tier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pyramid_vllm.plan import StepPlan
from pyramid_vllm.worker.runners.batch import Batch

Ints = npt.NDArray[np.int32]


class BatchRows:
    """Lengths and rows of all tiers, computed once a step, on the host.

    Arrays are NumPy's: on so few numbers most of a torch operator's time is its call.

    Args:
        plan: the step's plan.
        batch: the runner's batch.
        starts: ``[num_reqs + 1]``: first row of each request.
        seq_lens: ``[num_reqs]``: computed tokens with this step's.
        num_evicted: ``[num_tiers, num_reqs]``, computed tokens minus cache length,
            before this step.
    """

    def __init__(
        self,
        plan: StepPlan,
        batch: Batch,
        starts: Ints,
        seq_lens: Ints,
        num_evicted: Ints,
    ) -> None:
        self._batch = batch
        num_tiers = len(num_evicted)
        self.num_evicted = num_evicted
        """``[num_tiers, num_reqs]``"""
        self.num_scheduled: Ints = starts[1:] - starts[:-1]
        """``[num_reqs]``: tokens of this step."""
        self._starts = starts
        self.is_pruned = [False] * num_tiers
        self.seq_lens: Ints = seq_lens - num_evicted
        """``[num_tiers, num_reqs]``: tokens that each tier holds."""
        if plan.prunes:
            self._prune(plan)
        self.max_lens: list[int] = self.seq_lens.max(axis=1).tolist()
        """By tier: tokens of the request that has most."""
        self.total_scheduled = int(starts[-1])
        """Tokens of this step, of all requests."""

    @cached_property
    def num_rows(self) -> Ints:
        """``[num_tiers, num_reqs]``: rows that each tier computes."""
        return np.repeat(self.num_scheduled[None], len(self.num_evicted), axis=0)

    @cached_property
    def starts(self) -> Ints:
        """``[num_tiers, num_reqs + 1]``: their first rows."""
        return np.repeat(self._starts[None], len(self.num_evicted), axis=0)

    @cached_property
    def total_rows(self) -> list[int]:
        """Rows that each tier computes, of all requests."""
        total: list[int] = self.starts[:, -1].tolist()
        return total

    @cached_property
    def first_like(self) -> list[int]:
        """Of each tier, the first one that has the same lengths and rows."""
        found: dict[bytes, int] = {}
        keys = [lens.tobytes() for lens in self.seq_lens]
        if any(self.is_pruned):
            pairs = zip(keys, self.num_rows, strict=True)
            keys = [key + rows.tobytes() for key, rows in pairs]
        return [found.setdefault(key, tier) for tier, key in enumerate(keys)]

    @property
    def req_ids(self) -> Sequence[str]:
        """By row."""
        return self._batch.req_ids

    @property
    def row_of(self) -> Mapping[str, int]:
        """Row of each request."""
        return self._batch.row_of

    def _prune(self, plan: StepPlan) -> None:
        scheduled = self.num_scheduled
        for window in plan.windows:
            if window.num_rows is not None:
                self.num_rows[:, self.row_of[window.req_id]] = window.num_rows
        self.num_rows.cumsum(axis=1, out=self.starts[:, 1:])
        self.is_pruned = [bool(tier.any()) for tier in self.num_rows < scheduled]
        self.seq_lens -= scheduled - self.num_rows

    def progress(self) -> Iterator[tuple[str, int, int, int]]:
        """Of each request: its name, computed tokens with this step's, generated ones
        among them, and tokens of this step."""
        scheduled = self.num_scheduled.astype(np.int64)
        count = len(scheduled)
        ends = self._batch.num_computed[:count] + scheduled
        generated = ends - self._batch.num_prompt[:count]
        return zip(
            self._batch.req_ids,
            ends.tolist(),
            generated.tolist(),
            scheduled.tolist(),
            strict=True,
        )
