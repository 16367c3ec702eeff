"""One step on a worker: the plan, mapped to the rows of its batch."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pyramid_vllm.plan import PromptWindow, StepPlan

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class WindowRows:
    """A prompt window and where it lies in this step's batch."""

    window: PromptWindow
    row: int
    """Row of the request's block table."""
    query_start: int
    """First of its rows of the query tensor."""
    query_end: int
    num_evicted: tuple[int, ...]
    """Per tier, before this step."""


class TierStep:
    """The current step, shared by a worker's metadata builders and layers.

    Between ``begin`` and ``finish`` the plan holds; outside (profiling and warm-up
    steps) every tier is as in stock vLLM.

    Args:
        block_size: tokens of a page.
        input_batch: the runner's batch, for the order of its rows.
    """

    def __init__(self, block_size: int, input_batch: Any) -> None:
        self._block_size = block_size
        self._input_batch = input_batch
        self._plan: StepPlan | None = None
        self._rows: _BatchRows | None = None
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
            RuntimeError: a layer that should have compacted did not run.
        """
        plan, self._plan, self._rows = self._plan, None, None
        self.shared.clear()
        if plan and plan.windows and self.num_layers_done != num_layers:
            raise RuntimeError(
                f"KV policy: {self.num_layers_done} of {num_layers} layers compacted "
                f"{[window.req_id for window in plan.windows]}"
            )

    @property
    def has_windows(self) -> bool:
        """Whether layers have anything to do in this step."""
        return self._plan is not None and bool(self._plan.windows)

    @property
    def has_stock_lengths(self) -> bool:
        """Whether no request of this step has evicted tokens."""
        return self._plan is not None and not self._plan.has_evicted

    def windows(self) -> list[WindowRows]:
        """This step's windows with their rows."""
        assert self._rows is not None, "attention ran before its metadata was built"
        return self._rows.windows

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
            self._rows = _BatchRows(self._plan, self._input_batch, common)
        rows = self._rows
        if not rows.has_evicted[tier]:
            return common
        positions = rows.positions[tier]
        blocks = common.block_table_tensor[
            rows.row_of_token, positions // self._block_size
        ]
        slots = blocks * self._block_size + positions % self._block_size
        common.slot_mapping[: len(positions)] = slots
        tiered = copy.copy(common)
        tiered.seq_lens = rows.seq_lens[tier]
        tiered.max_seq_len = int(tiered.seq_lens.max())
        tiered.seq_lens_cpu_upper_bound = None
        tiered._num_computed_tokens_cache = None
        return tiered


class _BatchRows:
    """Lengths and positions of all tiers, computed once a step."""

    def __init__(
        self, plan: StepPlan, input_batch: Any, common: CommonAttentionMetadata
    ) -> None:
        row_of = input_batch.req_id_to_index
        starts = common.query_start_loc_cpu
        num_reqs, num_tiers = common.num_reqs, plan.num_evicted.shape[1]
        # [num_tiers, num_reqs]: kernels read a tier's lengths as contiguous memory.
        num_evicted = torch.zeros(num_tiers, num_reqs, dtype=torch.int32)
        self.has_evicted = [False] * num_tiers
        if plan.has_evicted:
            order = [row_of[req_id] for req_id in plan.req_ids]
            num_evicted[:, order] = torch.from_numpy(plan.num_evicted.T)
            self.has_evicted = (num_evicted > 0).any(dim=1).tolist()
            self.seq_lens = common.seq_lens - num_evicted
            rows = torch.arange(num_reqs)
            self.row_of_token = torch.repeat_interleave(rows, starts[1:] - starts[:-1])
            # Slot of a request's first query, less that query's place in the batch.
            shift = self.seq_lens - starts[1:]
            tokens = torch.arange(len(self.row_of_token))
            self.positions = shift[:, self.row_of_token] + tokens
        self.windows = [
            WindowRows(
                window=window,
                row=(row := row_of[window.req_id]),
                query_start=int(starts[row]),
                query_end=int(starts[row + 1]),
                num_evicted=tuple(num_evicted[:, row].tolist()),
            )
            for window in plan.windows
        ]
