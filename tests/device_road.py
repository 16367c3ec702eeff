"""What a worker does on a GPU in a step, around a model runner that is made here.

The scheduler, its plans, and all of the worker's parts are the real ones, on tensors
that stand for a GPU's. The runner has what the policy asks of vLLM's V2 runner, and its
model's layers only random queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from pyramid_vllm.attention.layout import split_views
from pyramid_vllm.attention.tiered import TieredBuilder
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
from tests.device_tensors import DEVICE
from tests.scheduling import BLOCK_SIZE

MAX_REQS, MAX_TOKENS, MAX_BLOCKS = 8, 256, 16
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 16


class _Decoder(nn.Module):
    """A decoder layer: the policy's part of it."""

    part: TieredLayer | None = None

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: Any
    ) -> tuple[torch.Tensor, Any]:
        assert self.part is not None
        assert positions.shape[-1] == len(hidden_states)
        if self.part.is_active:
            self.part.after_attention(hidden_states.unflatten(1, (NUM_HEADS, -1)))
        return hidden_states, hidden_states if residual is None else residual


class _Model(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Decoder() for _ in range(num_layers))

    def forward(self, positions: torch.Tensor, hidden_states: Any) -> torch.Tensor:
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states


@dataclass
class Metadata:
    """As far as tiers look at it."""

    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class _Stock:
    num_heads_q = NUM_HEADS

    def build(self, prefix: int, common: Any, fast: bool) -> Metadata:
        return Metadata(common.seq_lens, common.block_table_tensor, common.slot_mapping)


class _Builder(TieredBuilder, _Stock):
    def __init__(self, spec: Any, tier: int, step: TierStep) -> None:
        self.kv_cache_spec, self.tier, self.tiers = spec, tier, step


class StandInRunner:
    """What the policy reads of the V2 runner, and a step that uses it."""

    def __init__(self, num_groups: int, num_layers: int) -> None:
        self.device, self.max_num_reqs, self.max_num_tokens = (
            DEVICE, MAX_REQS, MAX_TOKENS,
        )  # fmt: skip
        self.kernel_block_sizes = [BLOCK_SIZE] * num_groups
        tables = torch.zeros(
            num_groups, MAX_REQS, MAX_BLOCKS, dtype=torch.int32, device=DEVICE
        )
        self._batch_tables = torch.zeros_like(tables)
        self.block_tables = SimpleNamespace(
            num_kv_cache_groups=num_groups,
            block_sizes=self.kernel_block_sizes,
            num_blocks=SimpleNamespace(np=np.zeros((num_groups, MAX_REQS), np.int32)),
            block_tables=[SimpleNamespace(gpu=table) for table in tables],
            input_block_table_ptrs=async_tensor_h2d(
                [table.data_ptr() for table in self._batch_tables], DEVICE, torch.uint64
            ),
            block_table_strides=async_tensor_h2d([MAX_BLOCKS] * num_groups, DEVICE),
        )
        self.req_states = SimpleNamespace(
            req_id_to_index={}, prompt_len=SimpleNamespace(np=np.zeros(MAX_REQS, int))
        )
        self.cudagraph_manager = SimpleNamespace(dispatch=lambda *_, **__: None)
        self._free = list(range(MAX_REQS))
        self._computed = np.zeros(MAX_REQS, np.int32)
        self._generator = torch.Generator().manual_seed(0)
        self.builders: list[_Builder] = []
        self.model = _Model(num_layers)

    def gather_batch_req_state(self, *_: Any, **__: Any) -> tuple[Any, int | None]:
        return None, None

    def prepare_attn(self, batch: Any) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        tables = self.block_tables.block_tables
        for own, table in zip(self._batch_tables, tables, strict=True):
            own[: batch.num_reqs].copy_(table.gpu[batch.idx_mapping])
        size = len(tables), MAX_TOKENS
        slots = torch.zeros(size, dtype=torch.int64, device=DEVICE)
        return list(self._batch_tables), slots

    def execute_model(self, output: Any) -> Any:
        self._update(output)
        if not output.num_scheduled_tokens:
            return None
        batch = self._batch(output.num_scheduled_tokens)
        tables, slots = self.prepare_attn(batch)
        for group_id, builder in enumerate(self.builders):
            common = CommonAttentionMetadata(
                query_start_loc=batch.query_start_loc,
                query_start_loc_cpu=torch.from_numpy(batch.query_start_loc_np),
                seq_lens=batch.seq_lens,
                num_reqs=batch.num_reqs,
                num_actual_tokens=batch.num_tokens,
                max_query_len=max(output.num_scheduled_tokens.values()),
                max_seq_len=int(batch.seq_lens_cpu_upper_bound.max()),
                block_table_tensor=tables[group_id],
                slot_mapping=slots[group_id],
            )
            builder.build(0, common)
        width = NUM_HEADS * HEAD_SIZE
        hidden = torch.randn(batch.num_tokens, width, generator=self._generator)
        hidden = async_tensor_h2d(hidden, device=DEVICE)
        positions = torch.arange(batch.num_tokens, device=DEVICE)
        assert len(self.model(positions, hidden)) == batch.num_tokens
        return None

    def _update(self, output: Any) -> None:
        """Take requests that leave and arrive, and new pages."""
        slots = self.req_states.req_id_to_index
        for req_id in output.finished_req_ids | (output.preempted_req_ids or set()):
            if req_id in slots:
                self._free.append(slots.pop(req_id))
        for new in output.scheduled_new_reqs:
            slot = slots[new.req_id] = self._free.pop()
            self._computed[slot] = new.num_computed_tokens
            self.req_states.prompt_len.np[slot] = len(new.prompt_token_ids)
            self.block_tables.num_blocks.np[:, slot] = 0
            self._append(slot, new.block_ids)
        cached = output.scheduled_cached_reqs
        for req_id, computed, block_ids in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids,
            strict=True,
        ):  # fmt: skip
            self._computed[slots[req_id]] = computed
            if block_ids is not None:
                self._append(slots[req_id], block_ids)

    def _append(self, slot: int, block_ids: Any) -> None:
        for group_id, ids in enumerate(block_ids):
            start = self.block_tables.num_blocks.np[group_id, slot]
            if ids:
                table = self.block_tables.block_tables[group_id].gpu
                out = table[slot, start : start + len(ids)]
                async_tensor_h2d(list(ids), dtype=torch.int32, out=out)
            self.block_tables.num_blocks.np[group_id, slot] += len(ids)

    def _batch(self, scheduled: dict[str, int]) -> Any:
        slots = self.req_states.req_id_to_index
        order = np.array([slots[req_id] for req_id in scheduled], np.intp)
        counts = np.array(list(scheduled.values()), np.int32)
        starts = np.concatenate(([0], counts.cumsum())).astype(np.int32)
        seq_lens = self._computed[order] + counts
        return SimpleNamespace(
            req_ids=list(scheduled),
            num_reqs=len(order),
            num_reqs_after_padding=len(order),
            num_tokens=int(counts.sum()),
            idx_mapping=async_tensor_h2d(order, device=DEVICE),
            idx_mapping_np=order,
            query_start_loc=async_tensor_h2d(starts, device=DEVICE),
            query_start_loc_np=starts,
            seq_lens=async_tensor_h2d(seq_lens, device=DEVICE),
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            num_computed_tokens_np=self._computed[order],
        )


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
                part = TieredLayer(one, cache_group, place, state, self._one)
                runner.model.layers[one.index].part = part
                self.tier_layers.append(part)
            spec = group.kv_cache_spec
            runner.builders.append(_Builder(spec, tier, state.step))
