"""Kernels do the layers' work: for GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.logger import init_logger

from pyramid_vllm.kernels.requests_triton import PagedLayers
from pyramid_vllm.policy import KVPolicyError, PolicyConfig
from pyramid_vllm.worker.device.groups import compress_groups
from pyramid_vllm.worker.device.layer import DeviceGroup, DeviceLayer
from pyramid_vllm.worker.device.pruner import DevicePruner
from pyramid_vllm.worker.device.queries import DeviceGroupQueries
from pyramid_vllm.worker.device.step import DeviceStep
from pyramid_vllm.worker.device.warmup import compile_kernels
from pyramid_vllm.worker.query_slots import QueryShape
from pyramid_vllm.worker.timing import CompactionTimer, DeviceTimer, HostTimer
from pyramid_vllm.worker.v2 import V2Runner

if TYPE_CHECKING:
    from pyramid_vllm.plan import StepPlan
    from pyramid_vllm.worker.adapter import RunnerAdapter
    from pyramid_vllm.worker.layer import LayerConstants
    from pyramid_vllm.worker.shared import WorkerState

logger = init_logger(f"vllm.{__name__}")


class DevicePath:
    """See ``ComputePath``.

    Args:
        adapter: the runner's adapter.
        runner: vLLM's V2 runner.
        policies: by the names that plans use.
    """

    def __init__(
        self, adapter: RunnerAdapter, runner: Any, policies: Mapping[str, PolicyConfig]
    ) -> None:
        assert isinstance(adapter, V2Runner)
        self._adapter, self._runner, self._policies = adapter, runner, policies
        self._groups: list[DeviceGroup] = []
        self._step: DeviceStep | None = None

    def make_step(
        self, block_size: int, tier_of_group: Mapping[int, int]
    ) -> DeviceStep:
        """The current step; the runner prepares it."""
        self._step = DeviceStep(
            block_size, self._adapter, self._runner, tier_of_group, self._policies
        )
        self._adapter.prepare = self._step.prepare
        return self._step

    def make_queries(self, shape: QueryShape) -> DeviceGroupQueries:
        """The newest queries of generating requests."""
        assert self._step is not None
        runner = self._runner
        queries = DeviceGroupQueries(shape, runner.max_num_tokens, runner.device)
        self._step.group_queries = queries
        return queries

    def make_pruner(
        self, model: nn.Module, layers: list[nn.Module], tiers: tuple[int, ...]
    ) -> DevicePruner:
        """What narrows rows between tiers."""
        return DevicePruner(model, layers, tiers)

    def bind(
        self,
        group_id: int,
        layers: Sequence[tuple[Any, LayerConstants]],
        state: WorkerState,
    ) -> list[DeviceLayer]:
        """The parts of one cache group's layers."""
        device = self._runner.device
        constants = [one for _, one in layers]
        _check_alike(constants)
        group = DeviceGroup(
            group_id=group_id,
            tier=constants[0].tier,
            layers=[],
            keys=PagedLayers.of([one.cache.key for one in constants]),
            values=PagedLayers.of([one.cache.value for one in constants]),
            key_scales=torch.tensor(
                [_scale(layer, "_k_scale").data_ptr() for layer, _ in layers],
                dtype=torch.int64,
                device=device,
            ),
            indices=torch.tensor(
                [one.index for one in constants], dtype=torch.int64, device=device
            ),
        )
        for place, (layer, one) in enumerate(layers):
            scale = _scale(layer, "_q_scale").view(1)
            group.layers.append(DeviceLayer(one, group, place, state, scale))
        self._groups.append(group)
        return group.layers

    def warm_up(self, config: PolicyConfig) -> None:
        """Compile the policy's kernels."""
        assert self._step is not None
        model = self._runner.model_config
        heads = model.get_num_attention_heads(self._runner.parallel_config)
        count = compile_kernels(self._groups, config, self._step, heads, model.dtype)
        logger.info("KV policy %s: warmed up by %d launches", config.name, count)

    def make_timer(self) -> CompactionTimer:
        """What tells how long compactions take."""
        # Interpreted kernels have no stream.
        return DeviceTimer() if self._runner.device.type == "cuda" else HostTimer()

    def compress_groups(self, plan: StepPlan, state: WorkerState) -> None:
        """Compress groups of generated tokens, after the forward pass."""
        assert self._step is not None
        compress_groups(plan, self._policies, self._groups, self._step)

    def end_step(self, plan: StepPlan, state: WorkerState) -> None:
        """Forget the step's queries."""
        step = self._step
        assert step is not None
        if step.group_queries is not None:
            step.group_queries.end_step()


def _scale(layer: Any, name: str) -> torch.Tensor:
    """A layer's factor of quantized tensors: one float32 on the device.

    Raises:
        KVPolicyError: it has one for each head.
    """
    scale: torch.Tensor = getattr(layer, name)
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise KVPolicyError(
            f"kv_policy does not support {name} of {scale.numel()} {scale.dtype} "
            "values: valid is one float32 factor of a layer"
        )
    return scale


def _check_alike(constants: Sequence[LayerConstants]) -> None:
    """Check that one launch can score all layers of a group.

    Raises:
        KVPolicyError: they differ in what a launch has one value of.
    """
    kinds = {
        (one.scale, one.logits_soft_cap, one.sink_logits is None) for one in constants
    }
    if len(kinds) > 1:
        raise KVPolicyError(
            "kv_policy does not support layers of one tier that differ in scale, "
            f"logits_soft_cap or sinks: they have {sorted(map(str, kinds))}"
        )
