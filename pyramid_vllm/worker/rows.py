"""The rows of a step's batch, by tier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from pyramid_vllm.plan import StepPlan
from pyramid_vllm.worker.runners.batch import Batch


class BatchRows:
    """Lengths and rows of all tiers, computed once a step, on the host.

    Args:
        plan: the step's plan.
        batch: the runner's batch.
        starts: ``[num_reqs + 1]``, int32, on CPU: first row of each request.
        seq_lens: ``[num_reqs]``, int32, on CPU: computed tokens with this step's.
        num_evicted: ``[num_tiers, num_reqs]``, computed tokens minus cache length,
            before this step.
    """

    def __init__(
        self,
        plan: StepPlan,
        batch: Batch,
        starts: torch.Tensor,
        seq_lens: torch.Tensor,
        num_evicted: npt.NDArray[np.int32],
    ) -> None:
        self._batch = batch
        num_reqs, num_tiers = len(seq_lens), len(num_evicted)
        self.num_evicted = torch.from_numpy(num_evicted)
        """``[num_tiers, num_reqs]``, int32."""
        self.num_scheduled = (starts[1:] - starts[:-1]).to(torch.int32)
        """``[num_reqs]``: tokens of this step."""
        self.num_rows = self.num_scheduled.expand(num_tiers, -1)
        """``[num_tiers, num_reqs]``: rows that each tier computes."""
        self.starts = starts.to(torch.int32).expand(num_tiers, -1)
        """``[num_tiers, num_reqs + 1]``: their first rows."""
        self.is_pruned = [False] * num_tiers
        self.seq_lens = seq_lens - self.num_evicted
        """``[num_tiers, num_reqs]``: tokens that each tier holds."""
        if plan.prunes:
            self._prune(plan)
        self.total_rows: list[int] = self.starts[:, -1].tolist()
        """Rows that each tier computes, of all requests."""
        self.total_scheduled = int(starts[num_reqs])
        """Tokens of this step, of all requests."""

    @cached_property
    def first_like(self) -> list[int]:
        """Of each tier, the first one that has the same lengths and rows."""
        lens, rows = self.seq_lens.numpy(), self.num_rows.numpy()
        found: dict[tuple[bytes, bytes], int] = {}
        return [
            found.setdefault((lens[tier].tobytes(), rows[tier].tobytes()), tier)
            for tier in range(len(lens))
        ]

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
        self.num_rows = self.num_rows.contiguous()
        for window in plan.windows:
            if window.num_rows is not None:
                rows = torch.tensor(window.num_rows, dtype=torch.int32)
                self.num_rows[:, self.row_of[window.req_id]] = rows
        self.starts = torch.zeros(
            len(self.num_rows), len(scheduled) + 1, dtype=torch.int32
        )
        self.starts[:, 1:] = self.num_rows.cumsum(1)
        self.is_pruned = (self.num_rows < scheduled).any(dim=1).tolist()
        self.seq_lens -= scheduled - self.num_rows

    def progress(self) -> Iterator[tuple[str, int, int, int]]:
        """Of each request: its name, computed tokens with this step's, generated ones
        among them, and tokens of this step."""
        scheduled = self.num_scheduled.numpy().astype(np.int64)
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
