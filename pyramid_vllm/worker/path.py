"""Who does the layers' work: references on CPU, kernels on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from pyramid_vllm.attention.access import KVAccess
from pyramid_vllm.attention.device import DeviceAccess
from pyramid_vllm.worker.groups import CacheGroup, compress_groups
from pyramid_vllm.worker.layer import LayerConstants, TieredLayer
from pyramid_vllm.worker.prune import RowPruner
from pyramid_vllm.worker.query_slots import GroupQueries, QueryShape, QuerySlots
from pyramid_vllm.worker.step import TierStep
from pyramid_vllm.worker.timing import CompactionTimer, HostTimer

if TYPE_CHECKING:
    from pyramid_vllm.plan import StepPlan
    from pyramid_vllm.policy import PolicyConfig
    from pyramid_vllm.worker.adapter import RunnerAdapter
    from pyramid_vllm.worker.shared import WorkerState


class ComputePath(Protocol):
    """Builds what the worker's layers are made of, and ends their steps."""

    def make_step(self, block_size: int, tier_of_group: Mapping[int, int]) -> TierStep:
        """The current step."""

    def make_queries(self, shape: QueryShape) -> QuerySlots:
        """The newest queries of generating requests."""

    def make_pruner(
        self, model: nn.Module, layers: list[nn.Module], tiers: tuple[int, ...]
    ) -> RowPruner:
        """What narrows rows between tiers."""

    def bind(
        self,
        group_id: int,
        layers: Sequence[tuple[Any, LayerConstants]],
        state: WorkerState,
    ) -> list[Any]:
        """The parts of one cache group's layers; given vLLM's layers."""

    def warm_up(self, config: PolicyConfig) -> None:
        """Prepare for the first request."""

    def make_timer(self) -> CompactionTimer:
        """What tells how long compactions take."""

    def compress_groups(self, plan: StepPlan, state: WorkerState) -> None:
        """Compress groups of generated tokens, after the forward pass."""

    def end_step(self, plan: StepPlan, state: WorkerState) -> None:
        """After the forward pass and ``compress_groups``."""


class ReferencePath:
    """Torch, one window after the other: for CPU.

    Args:
        adapter: the runner.
    """

    def __init__(self, adapter: RunnerAdapter) -> None:
        self._adapter = adapter
        self._groups: list[CacheGroup] = []

    def make_step(self, block_size: int, tier_of_group: Mapping[int, int]) -> TierStep:
        """The current step."""
        return TierStep(block_size, self._adapter)

    def make_queries(self, shape: QueryShape) -> QuerySlots:
        """The newest queries of generating requests."""
        return GroupQueries(shape)

    def make_pruner(
        self, model: nn.Module, layers: list[nn.Module], tiers: tuple[int, ...]
    ) -> RowPruner:
        """What narrows rows between tiers."""
        return RowPruner(model, layers, tiers)

    def bind(
        self,
        group_id: int,
        layers: Sequence[tuple[Any, LayerConstants]],
        state: WorkerState,
    ) -> list[Any]:
        """The parts of one cache group's layers."""
        bound = [TieredLayer(constants, state) for _, constants in layers]
        self._groups.append(CacheGroup(group_id, bound[0].tier, bound))
        return bound

    def warm_up(self, config: PolicyConfig) -> None:
        """Nothing is compiled."""

    def make_timer(self) -> CompactionTimer:
        """What tells how long compactions take."""
        return HostTimer()

    def compress_groups(self, plan: StepPlan, state: WorkerState) -> None:
        """Compress groups of generated tokens, after the forward pass."""
        queries = state.group_queries
        assert queries is None or isinstance(queries, GroupQueries)
        compress_groups(
            plan, state.policies, self._groups, queries, self._adapter, state.record
        )

    def end_step(self, plan: StepPlan, state: WorkerState) -> None:
        """Nothing is left to do."""


def path_of(
    access: KVAccess,
    adapter: RunnerAdapter,
    runner: Any,
    policies: Mapping[str, PolicyConfig],
) -> ComputePath:
    """The path of an engine.

    Args:
        access: to the cache of one of its layers.
        adapter: the runner's adapter.
        runner: vLLM's runner.
        policies: by the names that plans use.
    """
    if not isinstance(access, DeviceAccess):
        return ReferencePath(adapter)
    from pyramid_vllm.worker.device.path import DevicePath

    return DevicePath(adapter, runner, policies)
