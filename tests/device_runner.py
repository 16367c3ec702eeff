"""What the policy asks of vLLM's V2 runner, in tensors that stand for a GPU's.

A step's inputs and metadata are made as the runner makes them, as far as the policy
looks at them. The model's layers have random queries, and the policy's part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from pyramid_vllm.attention.tiered import TieredBuilder
from pyramid_vllm.worker.layer import TieredLayer
from pyramid_vllm.worker.step import TierStep
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


class Builder(TieredBuilder, _Stock):
    def __init__(self, spec: Any, tier: int, step: TierStep) -> None:
        self.kv_cache_spec, self.tier, self.tiers = spec, tier, step


class _Tables:
    """The pages of all requests, and of a batch's."""

    def __init__(self, num_groups: int) -> None:
        size = num_groups, MAX_REQS, MAX_BLOCKS
        tables = torch.zeros(size, dtype=torch.int32, device=DEVICE)
        self.of_batch = torch.zeros_like(tables)
        self.num_kv_cache_groups = num_groups
        self.block_sizes = [BLOCK_SIZE] * num_groups
        self.num_blocks = SimpleNamespace(np=np.zeros(size[:2], np.int32))
        self.block_tables = [SimpleNamespace(gpu=table) for table in tables]
        pointers = [table.data_ptr() for table in self.of_batch]
        self.input_block_table_ptrs = async_tensor_h2d(pointers, DEVICE, torch.uint64)
        self.block_table_strides = async_tensor_h2d([MAX_BLOCKS] * num_groups, DEVICE)

    def append_block_ids(
        self, req_index: int, new_block_ids: Any, overwrite: bool
    ) -> None:
        for group_id in range(self.num_kv_cache_groups):
            ids, counts = new_block_ids[group_id], self.num_blocks.np[group_id]
            start = 0 if overwrite else counts[req_index]
            if ids:
                table = self.block_tables[group_id].gpu
                out = table[req_index, start : start + len(ids)]
                async_tensor_h2d(list(ids), dtype=torch.int32, out=out)
            counts[req_index] = start + len(ids)


class StandInRunner:
    """What the policy reads of the V2 runner, and a step that uses it."""

    def __init__(self, num_groups: int, num_layers: int) -> None:
        self.device, self.max_num_reqs, self.max_num_tokens = (
            DEVICE, MAX_REQS, MAX_TOKENS,
        )  # fmt: skip
        self.kernel_block_sizes = [BLOCK_SIZE] * num_groups
        self.block_tables = _Tables(num_groups)
        self.req_states = SimpleNamespace(
            req_id_to_index={}, prompt_len=SimpleNamespace(np=np.zeros(MAX_REQS, int))
        )
        self.cudagraph_manager = SimpleNamespace(dispatch=lambda *_, **__: None)
        self._free = list(range(MAX_REQS))
        self._computed = np.zeros(MAX_REQS, np.int32)
        self._generator = torch.Generator().manual_seed(0)
        self.builders: list[Builder] = []
        self.model = _Model(num_layers)

    def gather_batch_req_state(self, *_: Any, **__: Any) -> tuple[Any, int | None]:
        return None, None

    def prepare_attn(self, batch: Any) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        tables = self.block_tables
        for own, table in zip(tables.of_batch, tables.block_tables, strict=True):
            own[: batch.num_reqs].copy_(table.gpu[batch.idx_mapping])
        size = tables.num_kv_cache_groups, MAX_TOKENS
        slots = torch.zeros(size, dtype=torch.int64, device=DEVICE)
        return list(tables.of_batch), slots

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
            self.block_tables.append_block_ids(slot, new.block_ids, True)
        cached = output.scheduled_cached_reqs
        for req_id, computed, block_ids in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids,
            strict=True,
        ):  # fmt: skip
            self._computed[slots[req_id]] = computed
            if block_ids is not None:
                slot = slots[req_id]
                self.block_tables.append_block_ids(slot, block_ids, False)

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
