"""A step's prompt windows as kernels read them: tier by tier, one column a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pyramid_vllm.kernels.spans import Spans
from pyramid_vllm.plan import PromptWindow
from pyramid_vllm.policy import PolicyConfig, Queries
from pyramid_vllm.worker.rows import BatchRows

Ints = npt.NDArray[np.int32]
_FIELDS = Spans._fields


@dataclass(frozen=True)
class Bounds:
    """What the host has to know of a launch: bounds, and whether there is anything."""

    max_queries: int
    max_tokens: int
    max_columns: int
    is_scored: bool
    moves: bool

    @classmethod
    def of(cls, spans: Ints, moved: Ints) -> Bounds:
        """Of ``[num_fields, num_windows]``.

        Args:
            spans: what is scored.
            moved: what is chosen from.
        """
        queries = spans[_FIELDS.index("num_queries")]
        kept, held = (moved[_FIELDS.index(name)] for name in ("num_kept", "num_held"))
        return cls(
            max_queries=max(1, int(queries.max())),
            max_tokens=max(1, int(spans[_FIELDS.index("num_held")].max())),
            max_columns=max(1, int(spans[_FIELDS.index("num_columns")].max())),
            is_scored=bool(queries.any()),
            moves=bool((kept < held).any()),
        )


@dataclass(frozen=True)
class WindowColumns:
    """Some windows and where they lie in the step's batch.

    Arrays are int32, ``[num_windows]`` or ``[num_tiers, num_windows]``.
    """

    windows: Sequence[PromptWindow]
    row: Ints
    """Row of the block table."""
    num_scheduled: Ints
    starts: Ints
    """By tier: first row of its queries."""
    num_rows: Ints
    """By tier: rows that it computes."""
    num_held: Ints
    """By tier: tokens in its pages while the step runs."""

    @property
    def num_own(self) -> Ints:
        """By tier: those of them that are not in shared pages, and have scores."""
        shared = np.array([window.num_shared for window in self.windows], np.int32)
        own: Ints = self.num_held - shared
        return own

    @classmethod
    def of(cls, windows: Sequence[PromptWindow], rows: BatchRows) -> WindowColumns:
        """Of a plan's windows."""
        order = np.array([rows.row_of[window.req_id] for window in windows], np.int32)
        scheduled = rows.num_scheduled[order]
        num_rows = rows.num_rows[:, order]
        ends = np.array([window.num_tokens for window in windows], dtype=np.int32)
        before = ends - scheduled - rows.num_evicted[:, order]
        starts = rows.starts[:, order]
        return cls(windows, order, scheduled, starts, num_rows, before + num_rows)

    def chosen(self, columns: Sequence[int]) -> WindowColumns:
        """Some of the windows."""
        return WindowColumns(
            [self.windows[i] for i in columns],
            self.row[columns],
            self.num_scheduled[columns],
            self.starts[:, columns],
            self.num_rows[:, columns],
            self.num_held[:, columns],
        )


class WindowBatch:
    """Windows of one policy whose queries lie in one tensor.

    Built on the host; ``upload`` takes what was sent to the device.

    Args:
        config: the policy.
        columns: the windows.
        packed: whether queries of earlier chunks are put before those of this one.
        first: ``[num_tiers]``: place of the first window's scores.
    """

    def __init__(
        self, config: PolicyConfig, columns: WindowColumns, packed: bool, first: Ints
    ) -> None:
        self.config, self.columns, self.packed = config, columns, packed
        self.windows = columns.windows
        self.is_ordered = all(window.is_ordered for window in self.windows)
        own = columns.num_own
        self.offsets: Ints = first[:, None] + own.cumsum(1, dtype=np.int32) - own
        """``[num_tiers, num_windows]``: place of each one's scores."""
        moving, narrowing, rows = self.on_host = self._spans()
        self.bounds = [Bounds.of(tier, tier) for tier in moving]
        self.narrow_bounds = [
            Bounds.of(*tier) for tier in zip(narrowing, rows, strict=True)
        ]
        """By tier: the same where rows are chosen for the next one."""
        self.spans: list[Spans] = []
        self.narrow_spans: list[Spans] = []
        self.row_spans: list[Spans] = []
        """By tier: the chunk's rows, of which the next tier computes some."""
        self.targets: torch.Tensor | None = None
        """``[num_groups, num_windows, max_blocks]``, int32: see ``targets_on_host``."""

    def upload(self, sent: torch.Tensor, targets: torch.Tensor | None) -> None:
        """Take ``on_host`` and ``targets_on_host`` as they lie on the device."""
        self.spans, self.narrow_spans, self.row_spans = (
            [Spans.of(tier) for tier in kind] for kind in sent
        )
        self.targets = targets

    def targets_on_host(self, num_groups: int, page: int) -> Ints | None:
        """``[num_groups, num_windows, max_blocks]``: pages that kept tokens are
        gathered into, by their place in the block table; -1: the table's own.

        Args:
            num_groups: KV cache groups of the runner.
            page: tokens of a page.

        Returns:
            None: all windows are compacted in place.
        """
        if all(window.pages is None for window in self.windows):
            return None
        width = -(-int(self.columns.num_held.max()) // page)
        targets = np.full((num_groups, len(self.windows), width), -1, dtype=np.int32)
        for column, window in enumerate(self.windows):
            first = window.num_shared // page
            for group, pages in enumerate(window.pages or ()):
                if pages is not None:
                    targets[group, column, first : first + len(pages)] = pages
        return targets

    def _spans(self) -> Ints:
        """``[3, num_tiers, num_fields, num_windows]``: the three kinds of spans."""
        columns, config = self.columns, self.config
        held, num_rows = columns.num_held, columns.num_rows
        every = config.scored_queries is Queries.ALL
        wanted = np.array([window.num_queries for window in self.windows], np.int32)
        retain = np.array([window.retain for window in self.windows])
        # Of pages that are shared nothing is scored, chosen or moved.
        shared = np.array([window.num_shared for window in self.windows], np.int32)
        recent = np.array([window.num_recent for window in self.windows], np.int32)
        queries = num_rows if every else np.broadcast_to(wanted, held.shape)
        if self.packed:
            start = np.broadcast_to(wanted.cumsum() - wanted, held.shape)
        else:
            start = columns.starts + num_rows - queries
        kept = self._num_kept()
        # Rows that the next tier computes; the last tier's are not chosen from.
        stay = np.concatenate((num_rows[1:], num_rows[-1:]))
        moves = (kept < held) | (every & retain)
        spans = {
            "row": columns.row,
            "query_start": start,
            "num_queries": np.where(moves, queries, 0),
            "num_held": held,
            "num_kept": kept,
            "num_first": np.minimum(np.maximum(config.sinks, shared), held),
            "num_recent": recent,
            "column": shared,
            "num_columns": columns.num_own,
            "offset": self.offsets,
        }
        narrows = np.where(moves | (stay < num_rows), queries, 0)
        ends = np.array([window.num_tokens for window in self.windows], np.int32)
        rows = {
            "row": columns.row,
            "num_held": num_rows,
            "num_kept": stay,
            "num_first": np.maximum(0, config.sinks - (ends - columns.num_scheduled)),
            "num_recent": np.minimum(columns.num_scheduled, recent),
            "num_columns": num_rows,
            "offset": self.offsets + columns.num_own - num_rows,
        }
        return np.stack(
            [
                _stacked(held.shape, fields)
                for fields in (spans, spans | {"num_queries": narrows}, rows)
            ]
        )

    def _num_kept(self) -> Ints:
        """``[num_tiers, num_windows]``: tokens that stay."""
        kept = self.columns.num_held.copy()
        for column, window in enumerate(self.windows):
            if window.num_kept is not None:
                kept[:, column] = window.num_kept
        return kept


def _stacked(shape: tuple[int, ...], fields: Mapping[str, Any]) -> Ints:
    """``[num_tiers, num_fields, num_windows]``; fields that are not given are 0."""
    num_tiers, num_windows = shape
    spans = np.zeros((num_tiers, len(_FIELDS), num_windows), dtype=np.int32)
    for place, name in enumerate(_FIELDS):
        if name in fields:
            spans[:, place] = fields[name]
    return spans


def window_batches(
    windows: Sequence[PromptWindow],
    rows: BatchRows,
    policies: Mapping[str, PolicyConfig],
) -> tuple[list[WindowBatch], list[int]]:
    """A step's windows by policy, and by where their queries lie.

    Args:
        windows: of the step's plan.
        rows: the step's.
        policies: by the names that plans use.

    Returns:
        The batches, and how many scores each tier has in all of them.
    """
    every = WindowColumns.of(windows, rows)
    fewest = every.num_rows.min(axis=0).tolist()
    by_kind: dict[tuple[str, bool], list[int]] = {}
    for column, window in enumerate(windows):
        reads_recent = policies[window.policy].scored_queries is Queries.WINDOW
        packed = reads_recent and window.num_queries > fewest[column]
        by_kind.setdefault((window.policy, packed), []).append(column)
    totals, batches = np.zeros(len(every.num_rows), dtype=np.int32), []
    for (policy, packed), columns in by_kind.items():
        chosen = every.chosen(columns)
        batches.append(WindowBatch(policies[policy], chosen, packed, totals))
        totals = totals + chosen.num_own.sum(axis=1, dtype=np.int32)
    return batches, totals.tolist()
