"""The requests of a step, whichever runner keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.math_utils import cdiv

from pyramid_vllm.kernels.spans import BlockTables

if TYPE_CHECKING:
    from pyramid_vllm.plan import GeneratedWindow, PromptWindow, StepPlan


@dataclass(frozen=True)
class StepInputs:
    """What a runner has computed for a step before its metadata is built."""

    starts: torch.Tensor
    """``[num_reqs + 1]``, int32, on the device: first row of each request."""
    starts_on_host: npt.NDArray[np.int32]
    seq_lens: torch.Tensor
    """``[num_reqs]``, int32, on the device: computed tokens with this step's."""
    seq_lens_on_host: npt.NDArray[np.int32]
    num_padded: int
    """Requests with those that pad a captured graph."""
    tables: BlockTables
    slots: torch.Tensor | Sequence[torch.Tensor]
    """``[num_groups, num_tokens]``, int64, or a tensor for each cache group: rewritten
    in place, because the KV write reads the same memory."""


#: Takes a step's inputs.
Prepare = Callable[[StepInputs], None]


class RowChange(NamedTuple):
    """How a step's compaction changes a request's row of a block table."""

    req_id: str
    group: int
    """KV cache group of the table."""
    num_blocks: int
    """Pages that stay."""
    first: int
    """Place from which on ``pages`` replace what was there."""
    pages: Sequence[int]


def row_changes(
    plan: StepPlan, tier_of_group: Mapping[int, int], block_sizes: Mapping[int, int]
) -> Iterator[RowChange]:
    """Changes of the rows of all compacted requests.

    Args:
        plan: of the step that has run.
        tier_of_group: tiers of KV cache groups.
        block_sizes: tokens of a page, by group.
    """
    of_plan: list[PromptWindow | GeneratedWindow]
    of_plan = [*plan.windows, *plan.generated]
    windows = {window.req_id: window for window in of_plan}
    for req_id, _, num_kept in plan.compactions:
        window = windows[req_id]
        for group, tier in tier_of_group.items():
            size = block_sizes[group]
            num_blocks = first = cdiv(num_kept[tier], size)
            pages = window.pages[group] if window.pages else None
            if pages is not None:
                first = window.first_replaced(tier) // size
                num_blocks = first + len(pages)
            yield RowChange(req_id, group, num_blocks, first, pages or ())


class Batch(Protocol):
    """The requests of the current step, in the order of the runner's rows."""

    @property
    def req_ids(self) -> Sequence[str]:
        """By row."""

    @property
    def row_of(self) -> Mapping[str, int]:
        """Row of each request."""

    @property
    def num_computed(self) -> npt.NDArray[np.int32]:
        """``[num_reqs]`` or longer: computed tokens before this step."""

    @property
    def num_prompt(self) -> npt.NDArray[np.int32]:
        """``[num_reqs]`` or longer: prompt tokens."""

    @property
    def slots(self) -> npt.NDArray[np.intp]:
        """``[num_reqs]``: a place of each row's request that is its own as long as it
        runs, below the runner's ``max_num_reqs``."""

    @property
    def slots_on_device(self) -> torch.Tensor:
        """The same, on the device of the kernels."""

    def slot_of(self, req_id: str) -> int:
        """The slot of a request of the current batch."""

    def release(self, req_id: str) -> int | None:
        """Free the slot of a request that has left; None: it had none."""

    def pages(self, group_id: int) -> torch.Tensor:
        """``[num_reqs or more, max_blocks]``, int32: a cache group's block table."""
