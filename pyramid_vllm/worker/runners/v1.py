"""vLLM's V1 model runner: the order of its rows, and its block tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pyramid_vllm.kernels.spans import BlockTables
from pyramid_vllm.worker.runners.batch import Prepare, StepInputs, row_changes
from pyramid_vllm.worker.runners.generators import make_rewindable

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from pyramid_vllm.plan import StepPlan


class V1Runner:
    """What the policy needs of the runner; see ``RunnerAdapter`` and ``Batch``.

    Args:
        runner: vLLM's V1 runner, once its cache is allocated.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._batch = runner.input_batch
        self.prepare: Prepare | None = None
        """Not called: inputs are asked for."""
        self._slots: dict[str, int] = {}
        self._free_slots: list[int] = []

    @cached_property
    def _tables(self) -> BlockTables:
        """The runner's own memory, the same in every step."""
        tables = self._batch.block_table.block_tables
        return BlockTables.of([torch.from_numpy(t.block_table.np) for t in tables])

    @property
    def num_groups(self) -> int:
        """KV cache groups."""
        return len(self._batch.block_table.block_tables)

    def inputs(self, common: CommonAttentionMetadata) -> StepInputs:
        """A step's inputs, from its first group's metadata and all groups' tables."""
        tables = self._batch.block_table.block_tables
        starts = common.query_start_loc_cpu[: len(self.req_ids) + 1]
        seq_lens = common.seq_lens[: len(starts) - 1]
        return StepInputs(
            starts=starts,
            starts_on_host=starts.numpy(),
            seq_lens=seq_lens,
            seq_lens_on_host=seq_lens.numpy(),
            num_padded=common.num_reqs,
            tables=self._tables,
            slots=[table.slot_mapping.gpu for table in tables],
        )

    @property
    def req_ids(self) -> Sequence[str]:
        """By row."""
        return self._batch.req_ids

    @property
    def row_of(self) -> Mapping[str, int]:
        """Row of each request."""
        return self._batch.req_id_to_index

    @property
    def num_computed(self) -> npt.NDArray[np.int32]:
        """Computed tokens before this step."""
        return self._batch.num_computed_tokens_cpu

    @property
    def num_prompt(self) -> npt.NDArray[np.int32]:
        """Prompt tokens."""
        return self._batch.num_prompt_tokens

    @property
    def slots(self) -> npt.NDArray[np.intp]:
        """Rows move when requests leave: the adapter gives slots itself."""
        return np.array([self.slot_of(r) for r in self.req_ids], dtype=np.intp)

    @property
    def slots_on_device(self) -> torch.Tensor:
        """The device is the host."""
        return torch.from_numpy(self.slots)

    def slot_of(self, req_id: str) -> int:
        """The slot of a request, given when it is first asked for."""
        slot = self._slots.get(req_id)
        if slot is None:
            slot = self._free_slots.pop() if self._free_slots else len(self._slots)
            self._slots[req_id] = slot
        return slot

    def release(self, req_id: str) -> int | None:
        """Free the slot of a request that has left."""
        slot = self._slots.pop(req_id, None)
        if slot is not None:
            self._free_slots.append(slot)
        return slot

    def pages(self, group_id: int) -> torch.Tensor:
        """A cache group's block table."""
        return self._tables.tensors[group_id]

    def kernel_block_size(self, group_id: int) -> int:
        """Tokens of the blocks that a group's kernels see."""
        return self._batch.block_table[group_id].block_size

    def begin(self, plan: StepPlan) -> None:
        """Before the runner's step."""

    def after_forward(self) -> None:
        """Between the forward pass and sampling."""
        make_rewindable(self._runner)

    def truncate(self, tier_of_group: Mapping[int, int], plan: StepPlan) -> int:
        """Cut compacted requests' rows to the pages that they keep, or replace them by
        those that their tokens were gathered into.

        The scheduler has freed the other pages; the next ones it allocates are
        appended.
        """
        num_fewer, tables = 0, self._batch.block_table
        sizes = {group: tables[group].block_size for group in tier_of_group}
        for change in row_changes(plan, tier_of_group, sizes):
            row = self._batch.req_id_to_index[change.req_id]
            block_ids = self._runner.requests[change.req_id].block_ids[change.group]
            table, end = tables[change.group], change.num_blocks
            last = table.num_blocks_per_row[row]
            num_fewer += int(last) - end
            table.block_table.np[row, change.first : end] = change.pages
            table.block_table.np[row, end:last] = 0
            table.num_blocks_per_row[row] = end
            block_ids[change.first :] = change.pages
        return num_fewer
