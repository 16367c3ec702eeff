"""What the policy asks of a model runner, whichever the engine chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from pyramid_vllm.worker.runners.batch import Batch, Prepare, StepInputs
from pyramid_vllm.worker.runners.v1 import V1Runner
from pyramid_vllm.worker.runners.v2 import V2Runner

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from pyramid_vllm.plan import StepPlan


class RunnerAdapter(Batch, Protocol):
    """A model runner, as the worker uses it."""

    prepare: Prepare | None
    """Set by the worker: called with each step's inputs."""

    @property
    def num_groups(self) -> int:
        """KV cache groups."""

    def inputs(self, common: CommonAttentionMetadata) -> StepInputs:
        """A step's inputs, where they are asked for when its metadata is built."""

    def kernel_block_size(self, group_id: int) -> int:
        """Tokens of the blocks that a group's kernels see."""

    def begin(self, plan: StepPlan) -> None:
        """Before the runner's step."""

    def after_forward(self) -> None:
        """Between the forward pass and sampling."""

    def truncate(self, tier_of_group: Mapping[int, int], plan: StepPlan) -> int:
        """Cut the rows of compacted requests to the pages that they keep.

        Returns:
            Pages that the rows have fewer.
        """


def adapter_of(runner: Any, is_v2: bool) -> RunnerAdapter:
    """The adapter of a runner whose cache is allocated."""
    return V2Runner(runner) if is_v2 else V1Runner(runner)
