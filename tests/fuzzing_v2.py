"""The worker without a model, on the block tables and kernels of vLLM's V2 runner."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401  # what a CPU has in place of pinned memory
from vllm.v1.worker.gpu.block_table import BlockTables

from pyramid_vllm.kernels import on_triton
from pyramid_vllm.plan import StepPlan
from pyramid_vllm.scheduler import PyramidScheduler
from pyramid_vllm.spec import model_weights, request_policies, required_policy
from pyramid_vllm.worker.runners.v2 import V2Runner
from pyramid_vllm.worker.step import TierStep
from tests.fuzzing import _MAX_REQS, PageWorker, Tokens

_MAX_TOKENS = 1024


class V2PageWorker(PageWorker):
    """Slots and lengths are those that the package's kernel writes for a step."""

    def __init__(self, scheduler: PyramidScheduler, rng: random.Random) -> None:
        super().__init__(scheduler, rng)
        num_groups = len(self._tier_of_group)
        block_size = self._memory.shape[1]
        width = self.input_batch.block_table[0].block_table.np.shape[1]
        self._tables = BlockTables(
            block_sizes=[block_size] * num_groups,
            max_num_reqs=_MAX_REQS,
            max_num_batched_tokens=_MAX_TOKENS,
            max_num_blocks_per_group=[width] * num_groups,
            device=torch.device("cpu"),
        )
        rows = self.input_batch.req_id_to_index
        self._runner = SimpleNamespace(
            device=torch.device("cpu"),
            max_num_reqs=_MAX_REQS,
            block_tables=self._tables,
            req_states=SimpleNamespace(req_id_to_index=rows),
            gather_batch_req_state=lambda *_: (None, 1),
            cudagraph_manager=SimpleNamespace(dispatch=lambda *_: None),
            prepare_attn=self._prepare_attn,
        )
        self._adapter = V2Runner(self._runner)
        config = scheduler.vllm_config
        policies = request_policies(
            required_policy(config),
            self._managers[0].kv_cache_spec.num_layers,
            model_weights(config),
        )
        self._step = TierStep(
            block_size,
            self._adapter,
            self._runner,
            self._tier_of_group,
            policies.valid,
            on_triton,
        )
        self._adapter.prepare = self._step.prepare
        self._is_fresh: set[int] = set()
        self._slots_of_step: dict[tuple[str, int], Tokens] = {}

    def _add(self, req_id: str, tokens: list[int], block_ids: Any) -> None:
        # The row is the next request's: what it held counts no more.
        self._forget(req_id)
        self._is_fresh.add(self._free_rows[-1])
        super()._add(req_id, tokens, block_ids)

    def _append(self, req_id: str, block_ids: Any) -> None:
        row = self.input_batch.req_id_to_index[req_id]
        self._tables.append_block_ids(row, block_ids, overwrite=row in self._is_fresh)
        self._is_fresh.discard(row)

    def _prepare_attn(self, batch: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        """As the runner's own, which has no hook of ours in it."""
        tables = self._tables.gather_block_tables(batch.idx_mapping, batch.num_reqs)
        # What the runner's kernel writes here is not read: all of it is replaced.
        shape = (len(tables), int(batch.query_start_loc_np[-1]))
        slots = torch.full(shape, -7, dtype=torch.int64)
        return tables, slots

    def _begin(self, plan: StepPlan) -> None:
        self._step.begin(plan)

    def _prepare(self, output: Any, plan: StepPlan, starts: dict[str, int]) -> None:
        self._tables.apply_staged_writes()
        self._slots_of_step = {}
        step = self._step
        if not output.num_scheduled_tokens:
            step.finish(0)
            return
        batch = self._batch(output, starts)
        _, slots = self._runner.prepare_attn(batch)
        rows = step.rows
        for group_id, tier in self._tier_of_group.items():
            for row, req_id in enumerate(batch.req_ids):
                first, last = rows.starts[tier, row : row + 2].tolist()
                own = slots[group_id, first:last].numpy().copy()
                self._slots_of_step[req_id, group_id] = own
                held = len(self.requests[req_id].held[group_id])
                if held or not starts[req_id]:  # else pages of the prefix cache
                    assert step.tier_lens[tier, row] == held + last - first
            assert step.tier_lens[tier, batch.num_reqs] == 0
        step.num_layers_done = 0
        step.finish(0)

    def _batch(self, output: Any, starts: dict[str, int]) -> Any:
        """The step's requests, decodes first, as the runner sorts them."""
        counts = output.num_scheduled_tokens
        req_ids = sorted(counts, key=lambda req_id: (counts[req_id] != 1, req_id))
        scheduled = np.array([counts[req_id] for req_id in req_ids], dtype=np.int32)
        computed = np.array([starts[req_id] for req_id in req_ids], dtype=np.int32)
        rows = [self.input_batch.req_id_to_index[req_id] for req_id in req_ids]
        first = np.concatenate(([0], scheduled.cumsum())).astype(np.int32)
        seq_lens = torch.from_numpy(computed + scheduled)
        return SimpleNamespace(
            req_ids=req_ids,
            num_reqs=len(req_ids),
            num_reqs_after_padding=len(req_ids) + 1,
            idx_mapping=torch.tensor(rows),
            idx_mapping_np=np.array(rows),
            query_start_loc=torch.from_numpy(first),
            query_start_loc_np=first,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens,
            num_computed_tokens_np=computed,
        )

    def _write(self, req_id: str, group_id: int, start: int, names: Tokens) -> None:
        slots = self._slots_of_step.pop((req_id, group_id), None)
        if slots is not None:  # the step's own tokens; else what a compaction moves
            pages, places = self._slots(req_id, group_id, start, start + len(names))
            assert np.array_equal(slots, pages * self._memory.shape[1] + places)
        super()._write(req_id, group_id, start, names)

    def _pages(self, req_id: str, group_id: int) -> npt.NDArray[np.int32]:
        row = self.input_batch.req_id_to_index[req_id]
        count = self._tables.num_blocks.np[group_id, row]
        return self._tables.block_tables[group_id].gpu[row, :count].numpy()

    def _truncate(self, plan: StepPlan) -> None:
        self._adapter.truncate(self._tier_of_group, plan)
