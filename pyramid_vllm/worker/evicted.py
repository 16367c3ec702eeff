"""Evicted tokens of a worker's requests: they change when something is evicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

if TYPE_CHECKING:
    from pyramid_vllm.plan import StepPlan
    from pyramid_vllm.worker.runners.batch import Batch


class EvictedTokens:
    """Computed tokens minus cache length, by tier and by the runner's request slot.

    Args:
        num_tiers: of the policy.
        max_num_reqs: slots.
        batch: gives the slot of each request.
        device: where kernels read the counts.
    """

    def __init__(
        self, num_tiers: int, max_num_reqs: int, batch: Batch, device: torch.device
    ) -> None:
        self._batch = batch
        self._on_host = np.zeros((num_tiers, max_num_reqs), dtype=np.int32)
        self._on_device = torch.zeros(
            num_tiers, max_num_reqs, dtype=torch.int32, device=device
        )
        if device.type == "cpu":
            self._on_device = torch.from_numpy(self._on_host)
        self._is_changed = False
        self._begun: Mapping[str, tuple[int, ...]] = {}
        """Of requests that the step begins with evicted tokens."""
        self._slots: npt.NDArray[np.intp] | None = None
        """Of the batch whose counts follow; None: a count has changed since."""
        self._rows = self._on_host
        self._rows_on_device: torch.Tensor | None = None

    def begin(self, plan: StepPlan) -> None:
        """Drop the counts of requests that finished or were preempted."""
        self._begun = plan.begun
        for req_id in plan.released:
            slot = self._batch.release(req_id)
            if slot is not None and self._on_host[:, slot].any():
                self._on_host[:, slot] = 0
                self._change()

    def finish(self, plan: StepPlan) -> None:
        """Take what a step has evicted."""
        for req_id, num_tokens, num_kept in plan.compactions:
            slot = self._batch.slot_of(req_id)
            self._on_host[:, slot] = num_tokens - np.array(num_kept)
            self._change()

    def _change(self) -> None:
        self._is_changed, self._slots = True, None

    def rows(self) -> npt.NDArray[np.int32]:
        """``[num_tiers, num_reqs]``: counts of the current batch, by row.

        Steps that only generate have the batch and the counts of the step before.
        """
        slots = self._batch.slots
        if self._begun:
            # Not earlier: the runner has given them their slots now.
            for req_id, num_evicted in self._begun.items():
                self._on_host[:, self._batch.slot_of(req_id)] = num_evicted
            self._begun = {}
            self._change()
        if self._slots is None or not np.array_equal(slots, self._slots):
            self._slots, self._rows_on_device = slots, None
            self._rows = self._on_host.take(slots, axis=1)
        return self._rows

    def rows_on_device(self) -> torch.Tensor:
        """``rows`` on the device: int32, contiguous."""
        if self._is_changed:
            if self._on_device.device.type != "cpu":
                async_tensor_h2d(self._on_host, out=self._on_device)
            self._is_changed = False
        if self._rows_on_device is None:
            slots = self._batch.slots_on_device
            self._rows_on_device = self._on_device.index_select(1, slots)
        return self._rows_on_device
