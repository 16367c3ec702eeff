"""The order of a step's requests, whichever runner keeps it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


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

    def pages(self, group_id: int) -> torch.Tensor:
        """``[num_reqs or more, max_blocks]``, int32: a cache group's block table."""
