"""A step's prompt windows as kernels read them: tier by tier, one column a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from pyramid_vllm.kernels.requests_triton import Spans
from pyramid_vllm.policy import PolicyConfig, Queries
from pyramid_vllm.worker.step import BatchRows, WindowRows

_FIELDS = Spans._fields


@dataclass(frozen=True)
class TierSize:
    """What the host has to know of a launch: bounds, and whether there is anything."""

    max_queries: int
    max_tokens: int
    is_scored: bool
    moves: bool


@dataclass
class WindowBatch:
    """Windows of one policy whose queries lie in one tensor.

    Built on the host from ``BatchRows``; ``upload`` brings it to the device.
    """

    config: PolicyConfig
    windows: Sequence[WindowRows]
    packed: bool
    """Whether queries of earlier chunks are put before those of this one."""
    offsets: npt.NDArray[np.int32]
    """``[num_tiers, num_windows]``: place of each one's scores."""
    sizes: list[TierSize] = field(default_factory=list)
    narrowed: list[TierSize] = field(default_factory=list)
    """By tier: the same where rows are chosen for the next one."""
    spans: list[Spans] = field(default_factory=list)
    narrow_spans: list[Spans] = field(default_factory=list)
    row_spans: list[Spans] = field(default_factory=list)
    """By tier: the chunk's rows, of which the next tier computes some."""

    def host_arrays(self) -> npt.NDArray[np.int32]:
        """``[3, num_tiers, num_fields, num_windows]``: the three kinds of spans."""
        num_tiers = len(self.offsets)
        arrays = np.zeros(
            (3, num_tiers, len(_FIELDS), len(self.windows)), dtype=np.int32
        )
        for tier in range(num_tiers):
            for column in range(len(self.windows)):
                moving, narrowing, rows = self._columns(tier, column)
                arrays[0, tier, :, column] = moving
                arrays[1, tier, :, column] = narrowing
                arrays[2, tier, :, column] = rows
            self.sizes.append(_size(arrays[0, tier]))
            self.narrowed.append(_size(arrays[1, tier], arrays[2, tier]))
        return arrays

    def upload(self, arrays: torch.Tensor) -> None:
        """Take the same arrays on the device."""
        moving, narrowing, rows = arrays
        self.spans = [Spans.of(part) for part in moving]
        self.narrow_spans = [Spans.of(part) for part in narrowing]
        self.row_spans = [Spans.of(part) for part in rows]

    def _columns(self, tier: int, column: int) -> tuple[tuple[int, ...], ...]:
        """A request's column in each of the arrays."""
        rows, config = self.windows[column], self.config
        window, offset = rows.window, int(self.offsets[tier, column])
        held, num_rows = rows.num_held(tier), rows.num_rows(tier)
        kept = held if window.num_kept is None else window.num_kept[tier]
        last = tier + 1 == len(self.offsets)
        stay = num_rows if last else rows.num_rows(tier + 1)
        every = config.scored_queries is Queries.ALL
        queries = num_rows if every else window.num_queries
        start = rows.query_ends[tier] - queries
        if self.packed:
            start = sum(other.window.num_queries for other in self.windows[:column])
        recent = window.num_recent
        first = min(config.sinks, held)

        def spans(num_queries: int) -> tuple[int, ...]:
            return (
                rows.row, start, 0, num_queries, held, kept, first, recent, 0, held,
                offset,
            )  # fmt: skip

        moves = kept < held or (every and window.retain)
        before = window.num_tokens - rows.num_scheduled
        of_rows = (
            rows.row, 0, 0, 0, num_rows, stay, max(0, config.sinks - before),
            min(rows.num_scheduled, recent), 0, num_rows, offset + held - num_rows,
        )  # fmt: skip
        narrows = queries if moves or stay < num_rows else 0
        return spans(queries if moves else 0), spans(narrows), of_rows


def _size(
    spans: npt.NDArray[np.int32], moved: npt.NDArray[np.int32] | None = None
) -> TierSize:
    """Bounds of a launch; ``moved``: spans whose tokens move, if others."""
    queries = spans[_FIELDS.index("num_queries")]
    held = spans[_FIELDS.index("num_held")]
    moved = spans if moved is None else moved
    moves = moved[_FIELDS.index("num_kept")] < moved[_FIELDS.index("num_held")]
    return TierSize(
        max_queries=max(1, int(queries.max())),
        max_tokens=max(1, int(held.max())),
        is_scored=bool(queries.any()),
        moves=bool(moves.any()),
    )


def window_batches(
    rows: BatchRows, policies: dict[str, PolicyConfig], num_tiers: int
) -> tuple[list[WindowBatch], list[int]]:
    """A step's windows by policy, and by where their queries lie.

    Args:
        rows: the step.
        policies: by the names that plans use.
        num_tiers: tiers.

    Returns:
        The batches, and how many scores each tier has in all of them.
    """
    by_kind: dict[tuple[str, bool], list[WindowRows]] = {}
    for window in rows.windows:
        config = policies[window.window.policy]
        computed = min(window.num_rows(tier) for tier in range(num_tiers))
        recent = config.scored_queries is Queries.WINDOW
        packed = recent and window.window.num_queries > computed
        by_kind.setdefault((window.window.policy, packed), []).append(window)
    totals, batches = [0] * num_tiers, []
    for (policy, packed), windows in by_kind.items():
        offsets = np.zeros((num_tiers, len(windows)), dtype=np.int32)
        for column, window in enumerate(windows):
            for tier in range(num_tiers):
                offsets[tier, column] = totals[tier]
                totals[tier] += window.num_held(tier)
        batches.append(WindowBatch(policies[policy], windows, packed, offsets))
    return batches, totals
