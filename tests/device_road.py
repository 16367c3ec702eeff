"""What a worker does on a GPU in a step, around a model runner that is made here.

The scheduler, its plans, and all of the worker's parts are the real ones, on tensors
that stand for a GPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d

from pyramid_vllm.attention.layout import split_views
from pyramid_vllm.kernels import on_triton
from pyramid_vllm.kernels.spans import Attention
from pyramid_vllm.spec import request_policies
from pyramid_vllm.worker.cache_group import CacheGroup, LayerConstants
from pyramid_vllm.worker.counters import WorkerCounters
from pyramid_vllm.worker.generated import GeneratedQueries, QueryShape
from pyramid_vllm.worker.layer import TieredLayer
from pyramid_vllm.worker.prune import RowPruner
from pyramid_vllm.worker.runners.v2 import V2Runner
from pyramid_vllm.worker.state import WorkerState
from pyramid_vllm.worker.step import TierStep
from pyramid_vllm.worker.tiered import TieredWorker
from pyramid_vllm.worker.timing import DeviceTimer
from tests.device_runner import (
    HEAD_SIZE,
    MAX_REQS,
    MAX_TOKENS,
    NUM_HEADS,
    NUM_KV_HEADS,
    Builder,
    StandInRunner,
)
from tests.device_tensors import DEVICE
from tests.scheduling import BLOCK_SIZE


class _StockWorker:
    model_runner: StandInRunner

    def execute_model(self, output: Any) -> Any:
        return self.model_runner.execute_model(output)

    def sample_tokens(self) -> Any:
        return SimpleNamespace()


class RoadWorker(TieredWorker, _StockWorker):
    """A worker over the runner above; made within ``Device``.

    Args:
        scheduler: whose plans it runs, and whose cache groups it has.
        config: vLLM's, of the scheduler.
        policy: the engine's.
    """

    def __init__(self, scheduler: Any, config: Any, policy: Any) -> None:
        groups = scheduler.kv_cache_config.kv_cache_groups
        num_layers = config.model_config.hf_text_config.num_hidden_layers
        self._is_warming_up = self._has_failed = False
        self.kv_policy, self.model_runner = (
            policy,
            StandInRunner(len(groups), num_layers),
        )
        self._tier_of_group = {
            g: one.kv_cache_spec.tier for g, one in enumerate(groups)
        }
        policies = request_policies(policy, num_layers, None)
        runner = self.model_runner
        self.adapter = V2Runner(runner)
        step = TierStep(
            BLOCK_SIZE, self.adapter, runner, self._tier_of_group, policies.valid,
            on_triton,
        )  # fmt: skip
        self.adapter.prepare = step.prepare
        if policy.generation and policy.needs_queries:
            shape = QueryShape(
                num_layers, MAX_REQS, policy.gen_queries, NUM_HEADS, HEAD_SIZE,
                torch.float32,
            )  # fmt: skip
            step.generated = GeneratedQueries(shape, MAX_TOKENS, DEVICE, on_triton)
        tiers = policies.rule.layout.tier_of_layer
        layers = list(runner.model.layers)
        self.tier_state = WorkerState(
            step=step,
            policies=policies.valid,
            pruner=RowPruner(runner.model, layers, tiers)
            if policies.rule.prunes
            else None,
            counters=WorkerCounters(num_layers),
            max_scores=1 << 20,
            timer=DeviceTimer(),
        )
        self._bind(groups, tiers, scheduler.kv_cache_config.num_blocks)

    def _bind(self, groups: Any, tiers: Sequence[int], num_blocks: int) -> None:  # type: ignore[override]
        state, runner = self.tier_state, self.model_runner
        assert state is not None
        self._groups, self.tier_layers = [], []
        self._one = torch.ones(1, device=DEVICE)
        size = num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
        for group_id, group in enumerate(groups):
            tier = group.kv_cache_spec.tier
            constants = []
            for index in sorted(map(extract_layer_index, group.layer_names)):
                cache = async_tensor_h2d(torch.randn(size), device=DEVICE)
                after = tiers[index + 1 : index + 2]
                prunes_next = state.pruner is not None and max(after, default=0) > tier
                views = split_views(cache, HEAD_SIZE)
                constants.append(LayerConstants(index, prunes_next, views))
            scales = [self._one.data_ptr()] * len(constants)
            attention = Attention(
                HEAD_SIZE**-0.5, 0.0, None, self._one,
                async_tensor_h2d(scales, DEVICE, torch.int64),
            )  # fmt: skip
            cache_group = CacheGroup(group_id, tier, constants, attention)
            self._groups.append(cache_group)
            for place, one in enumerate(constants):
                part = TieredLayer(one, cache_group, place, state, lambda: self._one)
                runner.model.layers[one.index].part = part
                self.tier_layers.append(part)
            spec = group.kv_cache_spec
            runner.builders.append(Builder(spec, tier, state.step))
