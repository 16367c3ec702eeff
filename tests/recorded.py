"""A scheduler and the policy's part of a GPU worker, without an engine or a GPU.

Launches are recorded by the keys under which Triton would compile them for a GPU, and
run nothing; everything else is the worker's own code. It needs a process of its own:
``TRITON_INTERPRET`` must not be set, for sizes of blocks differ with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from torch import nn
from triton.runtime.jit import JITFunction, compute_cache_key
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from pyramid_vllm.attention.layout import KVViews
from pyramid_vllm.kernels import on_triton
from pyramid_vllm.kernels.spans import Attention, BlockTables
from pyramid_vllm.limits import PromptLimits
from pyramid_vllm.spec import model_weights, request_policies, required_policy
from pyramid_vllm.worker import cache_group, prune
from pyramid_vllm.worker.cache_group import CacheGroup, LayerConstants
from pyramid_vllm.worker.counters import WorkerCounters
from pyramid_vllm.worker.generated import GeneratedQueries
from pyramid_vllm.worker.gpu import PyramidGPUWorker
from pyramid_vllm.worker.layer import TieredLayer
from pyramid_vllm.worker.prune import RowPruner
from pyramid_vllm.worker.runners.batch import Prepare, StepInputs
from pyramid_vllm.worker.state import WorkerState
from pyramid_vllm.worker.step import TierStep
from pyramid_vllm.worker.timing import HostTimer
from tests.compiled_kernels import _Driver
from tests.scheduling import scheduler_from

CPU = torch.device("cpu")


class Launches:
    """What would be compiled: name and key of each kernel."""

    def __init__(self) -> None:
        self.keys: set[tuple[str, str]] = set()

    def install(self) -> None:
        """Record every launch of this process from now on."""
        triton.runtime.driver.set_active(_Driver(80))
        launches = self

        def run(
            kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any
        ) -> None:
            _, keys, _, _, binder = kernel.device_caches[0]
            _, specialization, rest = binder(*args, **options)
            key = compute_cache_key(keys, specialization, rest)
            launches.keys.add((kernel.__name__, key))
            if kernel.__name__ == "_index_kernel":
                args[5].zero_()  # read by torch

        JITFunction.run = run
        # On pages that are not there, and with processes and steps that are not.
        cache_group.get_tensor_model_parallel_world_size = lambda: 1
        prune.get_tp_group = lambda: SimpleNamespace(broadcast=lambda _: None)
        prune.get_forward_context = SimpleNamespace

    def take(self) -> set[tuple[str, str]]:
        """What was recorded since the last call."""
        keys, self.keys = self.keys, set()
        return keys


class Requests:
    """Stands in for the V2 runner: the requests of each step."""

    prepare: Prepare | None = None

    def __init__(self, num_groups: int, max_num_reqs: int, max_blocks: int) -> None:
        self.num_groups = num_groups
        self._table = torch.zeros(max_num_reqs, max_blocks, dtype=torch.int32)
        self._free = list(range(max_num_reqs))
        self._slots: dict[str, int] = {}
        self._prompts: dict[str, int] = {}
        self.req_ids: Sequence[str] = ()

    def take(self, output: Any) -> None:
        """Take a scheduler's output."""
        for req in output.scheduled_new_reqs:
            self._prompts[req.req_id] = len(req.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        self.req_ids = list(output.num_scheduled_tokens)
        for req_id in self.req_ids:
            if req_id not in self._slots:
                self._slots[req_id] = self._free.pop()
        self.row_of: Mapping[str, int] = {r: i for i, r in enumerate(self.req_ids)}
        self.num_computed = np.array([computed[r] for r in self.req_ids], np.int32)
        self.num_prompt = np.array([self._prompts[r] for r in self.req_ids], np.int32)
        self.slots = np.array([self._slots[r] for r in self.req_ids], np.intp)
        self.slots_on_device = torch.from_numpy(self.slots)

    def inputs_of(self, output: Any, slots: torch.Tensor) -> StepInputs:
        """What the runner computes of a step before its metadata."""
        counts = [output.num_scheduled_tokens[r] for r in self.req_ids]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        lens = torch.from_numpy(self.num_computed) + torch.tensor(counts).int()
        tables = [self._table] * self.num_groups
        return StepInputs(
            starts, starts.numpy(), lens, lens.numpy(), len(counts),
            BlockTables.of(tables), slots[:, : int(starts[-1])],
        )  # fmt: skip

    def slot_of(self, req_id: str) -> int:
        return self._slots[req_id]

    def release(self, req_id: str) -> int | None:
        slot = self._slots.pop(req_id, None)
        if slot is not None:
            self._free.append(slot)
        return slot

    def pages(self, group_id: int) -> torch.Tensor:
        return self._table[: len(self.req_ids)]

    def begin(self, plan: Any) -> None: ...

    def after_forward(self) -> None: ...

    def truncate(self, tier_of_group: Any, plan: Any) -> int:
        return 0


class _Layer(nn.Module):
    def __init__(
        self, part: TieredLayer, heads: int, size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.part, self._heads, self._size, self._dtype = part, heads, size, dtype

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: Any
    ) -> tuple[torch.Tensor, Any]:
        shape = len(hidden_states), 2 * self._heads, self._size
        # As in models: a part of what holds keys and values too.
        query = torch.empty(shape, dtype=self._dtype)[:, : self._heads]
        self.part.after_attention(query)
        return hidden_states, residual


class _Model(nn.Module):
    def __init__(self, layers: list[_Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        positions, residual = torch.arange(len(hidden_states)), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states


class RecordedWorker:
    """A GPU's worker, but for vLLM's part of it.

    Args:
        config: vLLM's, from ``tests.scheduling.make_config``.
        scheduler: of the same.
        is_quantized: whether caches and queries are eight-bit floats.
    """

    def __init__(self, config: Any, scheduler: Any, is_quantized: bool = False) -> None:
        self.worker = worker = PyramidGPUWorker.__new__(PyramidGPUWorker)
        worker.vllm_config, worker.kv_policy = config, required_policy(config)
        worker.model_config = self._model = config.model_config
        worker.parallel_config = config.parallel_config
        worker.scheduler_config = config.scheduler_config
        quantizer = "any" if is_quantized else None
        worker._attention = [SimpleNamespace(query_quant=quantizer)]
        self._dtype = torch.float8_e4m3fn if is_quantized else self._model.dtype
        groups = scheduler.kv_cache_config.kv_cache_groups
        worker._tier_of_group = {
            i: group.kv_cache_spec.tier for i, group in enumerate(groups)
        }
        max_num_seqs = config.scheduler_config.max_num_seqs
        max_blocks = self._model.max_model_len // 32 + 1
        self.requests = Requests(len(groups), max_num_seqs, max_blocks)
        worker.adapter = self.requests  # type: ignore[assignment]
        num_tokens = config.scheduler_config.max_num_batched_tokens
        self._slots = torch.zeros(len(groups), num_tokens, dtype=torch.int64)
        worker.tier_state = self.state = self._state(max_num_seqs, num_tokens)
        worker._groups, worker.tier_layers = [], []
        for group_id, group in enumerate(groups):
            self._bind(group_id, group)
        worker.tier_layers.sort(key=lambda layer: layer.index)
        heads = self._model.get_num_attention_heads(config.parallel_config)
        size = heads, self._model.get_head_size(), self._dtype
        layers = [_Layer(part, *size) for part in worker.tier_layers]
        self._forward = _Model(layers)
        if self._rule.prunes:
            tiers = self._rule.layout.tier_of_layer
            self.state.pruner = RowPruner(self._forward, layers, tiers)

    def _state(self, max_num_seqs: int, num_tokens: int) -> WorkerState:
        worker, model = self.worker, self._model
        num_layers = model.hf_text_config.num_hidden_layers
        policies = request_policies(
            worker.kv_policy, num_layers, model_weights(worker.vllm_config)
        )
        self._rule, self.policies = policies.rule, policies
        runner = SimpleNamespace(device=CPU, max_num_reqs=max_num_seqs)
        step = TierStep(
            32, self.requests, runner, worker._tier_of_group, policies.valid, on_triton
        )  # type: ignore[arg-type]
        shape = worker._query_shape()
        if shape is not None:
            step.generated = GeneratedQueries(shape, num_tokens, CPU, on_triton)  # type: ignore[arg-type]
        limits = PromptLimits.of(worker.vllm_config)
        return WorkerState(
            step=step,
            policies=policies.valid,
            pruner=None,
            counters=WorkerCounters(num_layers),
            max_scores=limits.max_scores,
            timer=HostTimer(),
        )

    def _bind(self, group_id: int, group: Any) -> None:
        model, parallel = self._model, self.worker.parallel_config
        tiers = self._rule.layout.tier_of_layer
        shape = (1, model.get_num_kv_heads(parallel), 32, model.get_head_size())
        constants = []
        for name in group.layer_names:
            index = int(name.split(".")[2])
            is_last = index + 1 < len(tiers) and tiers[index + 1] > tiers[index]
            cache = KVViews(*torch.zeros(2, *shape, dtype=self._dtype))
            constants.append(
                LayerConstants(index, self._rule.prunes and is_last, cache)
            )
        one = torch.ones(1)
        scales = torch.tensor([one.data_ptr()] * len(constants))
        attention = Attention(0.1, 0.0, None, one, scales)
        tier = group.kv_cache_spec.tier
        own = CacheGroup(group_id, tier, constants, attention)
        self.worker._groups.append(own)
        for place, constant in enumerate(constants):
            part = TieredLayer(constant, own, place, self.state, lambda: one)
            self.worker.tier_layers.append(part)

    def run(self, output: Any) -> None:
        """Run a step by its plan."""
        self.worker._run_plan(output, self)

    def execute_model(self, output: Any) -> Any:
        """In place of vLLM's worker."""
        self.requests.take(output)
        if output.num_scheduled_tokens:
            inputs = self.requests.inputs_of(output, self._slots)
            self.state.step.prepare(inputs)
            num_tokens = int(inputs.starts[-1])
            width = self._model.get_hidden_size()
            self._forward(torch.empty(num_tokens, width, dtype=self._model.dtype))
        return EMPTY_MODEL_RUNNER_OUTPUT


def recorded_side(
    config: Any, num_blocks: int, is_quantized: bool = False
) -> tuple[Any, RecordedWorker]:
    """A scheduler, and the worker that runs its plans."""
    scheduler = scheduler_from(config, num_blocks)
    return scheduler, RecordedWorker(config, scheduler, is_quantized)


NAMES = ("requests", "held", "scores", "gathered", "normalizers")


class Peaks:
    """The most that a worker's buffers have held, after any step's layers.

    Args:
        worker: its steps are followed from now on.
    """

    def __init__(self, worker: RecordedWorker) -> None:
        self._worker, self._execute = worker, worker.execute_model
        self.found = dict.fromkeys(NAMES, 0)
        worker.execute_model = self._step  # type: ignore[method-assign]

    def _step(self, output: Any) -> Any:
        result = self._execute(output)
        self.look()
        return result

    def look(self) -> None:
        """Take what is held now."""
        state = self._worker.state
        stores = (state.queries._held, state.accumulated._held)
        tensors = [
            t for store in stores for held in store.values() for t in held.values()
        ]
        buffers = state.step.scratch._buffers.items()
        norms = sum(part.nbytes for name, part in buffers if "normalizers" in name)
        moved = sum(part.nbytes for name, part in buffers if name == "moved")
        self._take("requests", sum(map(len, stores)))
        self._take("held", sum(t.untyped_storage().nbytes() for t in tensors))
        self._take("scores", state.step.scratch.num_bytes - norms - moved)
        self._take("gathered", moved)
        self._take("normalizers", norms)

    def _take(self, name: str, value: int) -> None:
        self.found[name] = max(self.found[name], value)
