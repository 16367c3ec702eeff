"""The requests of a step, whichever runner keeps them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pyramid_vllm.kernels.spans import BlockTables


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
