"""One step on a worker: the plan, mapped to the rows of its batch."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pyramid_vllm.plan import PromptWindow, StepPlan
from pyramid_vllm.worker.batch import Batch

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class WindowRows:
    """A prompt window and where it lies in this step's batch."""

    window: PromptWindow
    row: int
    """Row of the request's block table."""
    query_starts: tuple[int, ...]
    """First of its rows of the query tensor, per tier."""
    query_ends: tuple[int, ...]
    num_evicted: tuple[int, ...]
    """Per tier, before this step."""
    num_scheduled: int
    """Prompt tokens of this step."""

    def num_held(self, tier: int) -> int:
        """Tokens in a tier's pages while this step runs."""
        before = self.window.num_tokens - self.num_scheduled - self.num_evicted[tier]
        return before + self.num_rows(tier)

    def num_rows(self, tier: int) -> int:
        """Rows that a tier computes."""
        return self.query_ends[tier] - self.query_starts[tier]


class TierStep:
    """The current step, shared by a worker's metadata builders and layers.

    Between ``begin`` and ``finish`` the plan holds; outside (profiling and warm-up
    steps) every tier is as in stock vLLM.

    Args:
        block_size: tokens of a page.
        batch: the runner's batch, for the order of its rows.
    """

    def __init__(self, block_size: int, batch: Batch) -> None:
        self._block_size = block_size
        self.batch = batch
        self._plan: StepPlan | None = None
        self._rows: BatchRows | None = None
        self.shared: dict[Hashable, Any] = {}
        """Metadata that builders share in a step where all tiers have stock lengths."""
        self.num_layers_done = 0
        """Layers that have handled this step's windows."""

    def begin(self, plan: StepPlan) -> None:
        """Start a step. Its rows are mapped when the first builder asks."""
        self._plan = plan
        self._rows = None
        self.num_layers_done = 0
        self.shared.clear()

    def finish(self, num_layers: int) -> None:
        """End a step.

        Raises:
            RuntimeError: a layer that should have compacted did not run, or the
                step ran with the lengths of stock vLLM.
        """
        plan, rows, self._plan, self._rows = self._plan, self._rows, None, None
        self.shared.clear()
        if plan and plan.windows and self.num_layers_done != num_layers:
            raise RuntimeError(
                f"KV policy: {self.num_layers_done} of {num_layers} layers compacted "
                f"{[window.req_id for window in plan.windows]}"
            )
        if plan and plan.req_ids and rows is None:
            raise RuntimeError(
                f"KV policy: no metadata of {list(plan.req_ids)} was built by tier"
            )

    @property
    def plan(self) -> StepPlan | None:
        """The step's plan; None outside of steps."""
        return self._plan

    @property
    def has_stock_lengths(self) -> bool:
        """Whether no request of this step has evicted or pruned tokens."""
        plan = self._plan
        return plan is not None and not (plan.has_evicted or plan.prunes)

    @property
    def rows(self) -> BatchRows:
        """This step's rows, by tier."""
        assert self._rows is not None, "attention ran before its metadata was built"
        return self._rows

    def for_tier(
        self, tier: int, common: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """The metadata with the tier's lengths; its slots are rewritten in place.

        The slots have to be written where they are, for the KV write reads the same
        storage. They follow from lengths alone, so that writing them twice is harmless.
        """
        if self._plan is None:
            return common
        if self._rows is None:
            starts = common.query_start_loc_cpu[: len(self.batch.req_ids) + 1]
            seq_lens = common.seq_lens[: len(starts) - 1]
            self._rows = BatchRows(self._plan, self.batch, starts, seq_lens)
        rows = self._rows
        if not (rows.has_evicted[tier] or rows.is_pruned[tier]):
            return common
        positions, row_of_token = rows.positions(tier)
        blocks = common.block_table_tensor[row_of_token, positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        common.slot_mapping[: len(positions)] = slots
        tiered = copy.copy(common)
        tiered.seq_lens = rows.seq_lens[tier]
        tiered.max_seq_len = int(tiered.seq_lens.max())
        tiered.seq_lens_cpu_upper_bound = None
        tiered._num_computed_tokens_cache = None
        if rows.is_pruned[tier]:
            tiered.query_start_loc = tiered.query_start_loc_cpu = rows.starts[tier]
            tiered.num_actual_tokens = len(positions)
            tiered.max_query_len = int(rows.num_rows[tier].max())
        return tiered


class BatchRows:
    """Lengths, rows and positions of all tiers, computed once a step.

    Args:
        plan: the step's plan.
        batch: the runner's batch.
        starts: ``[num_reqs + 1]``, int32, on CPU: first row of each request.
        seq_lens: ``[num_reqs]``, int32, on CPU: computed tokens with this step's.
    """

    def __init__(
        self, plan: StepPlan, batch: Batch, starts: torch.Tensor, seq_lens: torch.Tensor
    ) -> None:
        self._batch = batch
        self.row_of = batch.row_of
        num_reqs, num_tiers = len(seq_lens), plan.num_evicted.shape[1]
        # [num_tiers, num_reqs]: kernels read a tier's lengths as contiguous memory.
        self.num_evicted = torch.zeros(num_tiers, num_reqs, dtype=torch.int32)
        self.has_evicted = [False] * num_tiers
        if plan.has_evicted:
            order = [self.row_of[req_id] for req_id in plan.req_ids]
            self.num_evicted[:, order] = torch.from_numpy(plan.num_evicted.T)
            self.has_evicted = (self.num_evicted > 0).any(dim=1).tolist()
        scheduled = (starts[1:] - starts[:-1]).to(torch.int32)
        self.num_rows = scheduled.expand(num_tiers, -1)
        self.starts = starts.to(torch.int32).expand(num_tiers, -1)
        self.is_pruned = [False] * num_tiers
        if plan.prunes:
            self._prune(plan, scheduled)
        self.total_rows: list[int] = self.starts[:, -1].tolist()
        """Rows that each tier computes, of all requests."""
        self.seq_lens = seq_lens - self.num_evicted
        if plan.prunes:
            self.seq_lens -= scheduled - self.num_rows
        self._scheduled = scheduled
        self.total_scheduled = int(starts[num_reqs])
        """Tokens of this step, of all requests."""
        self._rows = torch.arange(num_reqs)
        self._row_of_token: torch.Tensor | None = None
        self.windows = self._windows(plan, scheduled) if plan.windows else []

    def _prune(self, plan: StepPlan, scheduled: torch.Tensor) -> None:
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

    def _windows(self, plan: StepPlan, scheduled: torch.Tensor) -> list[WindowRows]:
        order = [self.row_of[window.req_id] for window in plan.windows]
        first = self.starts[:, order].T.tolist()
        last = (self.starts[:, order] + self.num_rows[:, order]).T.tolist()
        evicted = self.num_evicted[:, order].T.tolist()
        return [
            WindowRows(
                window=window,
                row=row,
                query_starts=tuple(first[i]),
                query_ends=tuple(last[i]),
                num_evicted=tuple(evicted[i]),
                num_scheduled=int(scheduled[row]),
            )
            for i, (window, row) in enumerate(zip(plan.windows, order, strict=True))
        ]

    def positions(self, tier: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Place of each of the tier's rows in its request's pages, and its request.

        Both are ``[num_rows]``, int64.
        """
        rows, starts = self.num_rows[tier], self.starts[tier]
        if self.is_pruned[tier]:
            row_of_token = torch.repeat_interleave(self._rows, rows)
        else:
            if self._row_of_token is None:
                self._row_of_token = torch.repeat_interleave(self._rows, rows)
            row_of_token = self._row_of_token
        # A request's first place, less that row's place in the batch.
        shift = self.seq_lens[tier] - starts[1:]
        return shift[row_of_token] + torch.arange(len(row_of_token)), row_of_token

    def progress(self) -> Iterator[tuple[str, int, int, int]]:
        """Of each request: its name, computed tokens with this step's, generated ones
        among them, and tokens of this step."""
        batch, scheduled = self._batch, self._scheduled.numpy()
        count = len(scheduled)
        ends = batch.num_computed[:count] + scheduled
        generated = ends - batch.num_prompt[:count]
        return zip(
            batch.req_ids,
            ends.tolist(),
            generated.tolist(),
            scheduled.tolist(),
            strict=True,
        )
