"""Pruned prefill on a GPU: rows are gathered and scattered by kernels."""

from __future__ import annotations

import torch

from pyramid_vllm.kernels.prune_triton import gather_rows, row_indices, scatter_rows
from pyramid_vllm.worker.device.step import DeviceStep
from pyramid_vllm.worker.prune import RowPruner


class DevicePruner(RowPruner):
    """``RowPruner`` whose rows are chosen and moved on the device."""

    def set_rows(self, tier: int, step: DeviceStep, kept: torch.Tensor) -> None:
        """Set the rows that the tier behind ``tier`` computes.

        Args:
            tier: the tier that has just run.
            step: the current step.
            kept: ``[num_scores]``, int32: of each window the chunk's rows that stay.
        """
        assert step.starts is not None
        assert step.window_of is not None
        assert step.row_offsets is not None
        index = torch.empty(
            step.rows.total_rows[tier + 1], dtype=torch.int32, device=kept.device
        )
        row_indices(
            step.starts[tier],
            step.starts[tier + 1],
            step.window_of[tier],
            kept,
            step.row_offsets[tier],
            index,
        )
        self._kept[tier + 1] = index

    def _gather(self, rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return gather_rows(rows, kept)

    def _place(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return scatter_rows(rows, places, self._num_rows)
