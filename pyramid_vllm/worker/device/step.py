"""One step on a GPU: lengths, slots and windows, computed or uploaded once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from pyramid_vllm.kernels.lengths_triton import tier_lengths
from pyramid_vllm.kernels.scratch import Scratch
from pyramid_vllm.plan import StepPlan
from pyramid_vllm.policy import PolicyConfig
from pyramid_vllm.worker.batch import Batch
from pyramid_vllm.worker.device.windows import WindowBatch, window_batches
from pyramid_vllm.worker.step import BatchRows, TierStep

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from pyramid_vllm.worker.device.queries import DeviceGroupQueries


class _Upload:
    """Arrays that go to the device in one copy."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.int32]] = []

    def add(self, array: npt.NDArray[Any]) -> int:
        """Take an array along; its place is where ``send`` returns it."""
        self._arrays.append(np.ascontiguousarray(array, dtype=np.int32))
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> list[torch.Tensor]:
        """The same arrays, int32, on the device."""
        flat = np.concatenate([array.ravel() for array in self._arrays])
        sent = async_tensor_h2d(flat, device=device)
        parts = sent.split([array.size for array in self._arrays])
        return [
            part.view(array.shape)
            for part, array in zip(parts, self._arrays, strict=True)
        ]


class DeviceStep(TierStep):
    """The current step on a GPU.

    A captured graph reads lengths from ``tier_lens``, slots from the runner's own
    buffer: both are written before every replay.

    Args:
        block_size: tokens of a page.
        batch: the runner's batch.
        runner: vLLM's V2 runner.
        tier_of_group: tiers of its cache groups; groups of no tier are left out.
        policies: by the names that plans use.
    """

    def __init__(
        self,
        block_size: int,
        batch: Batch,
        runner: Any,
        tier_of_group: Mapping[int, int],
        policies: Mapping[str, PolicyConfig],
    ) -> None:
        super().__init__(block_size, batch)
        self.device: torch.device = runner.device
        self.scratch = Scratch(self.device)
        self._tables = runner.block_tables
        self._policies = dict(policies)
        self.num_tiers = max(tier_of_group.values()) + 1
        num_groups = self._tables.num_kv_cache_groups
        self._tier_of_group = torch.tensor(
            [tier_of_group.get(group, -1) for group in range(num_groups)],
            dtype=torch.int32,
            device=self.device,
        )
        self.tier_lens = torch.zeros(
            self.num_tiers, runner.max_num_reqs, dtype=torch.int32, device=self.device
        )
        self.group_queries: DeviceGroupQueries | None = None
        self.batches: list[WindowBatch] = []
        """This step's windows."""
        self.num_scores: list[int] = []
        """By tier, of all windows."""
        self.starts: torch.Tensor | None = None
        """``[num_tiers, num_reqs + 1]``, int32, where rows are pruned."""
        self.window_of: torch.Tensor | None = None
        """``[num_tiers, num_reqs]``, int32: place of a request's window whose rows are
        pruned for the next tier; -1: all of them stay."""
        self.row_offsets: torch.Tensor | None = None
        """``[num_tiers, num_windows]``, int32: place of its rows among the kept."""

    def begin(self, plan: StepPlan) -> None:
        """Start a step."""
        super().begin(plan)
        self.batches, self.num_scores = [], []
        self.starts = self.window_of = self.row_offsets = None

    def prepare(
        self, input_batch: Any, tables: Sequence[torch.Tensor], slots: torch.Tensor
    ) -> None:
        """Compute what builders and layers read; the runner's slots are there already.

        Args:
            input_batch: the runner's batch.
            tables: its block tables, by cache group.
            slots: ``[num_groups, num_tokens]``, int64, rewritten in place.
        """
        plan = self._plan
        if plan is None:
            return
        count = input_batch.num_reqs
        starts = torch.from_numpy(input_batch.query_start_loc_np[: count + 1])
        seq_lens = input_batch.seq_lens_cpu_upper_bound[:count]
        rows = self._rows = BatchRows(plan, self.batch, starts, seq_lens)
        if plan.windows:
            self.batches, self.num_scores = window_batches(
                rows, self._policies, self.num_tiers
            )
        upload = _Upload()
        evicted = upload.add(rows.num_evicted.numpy())
        windows = [upload.add(batch.host_arrays()) for batch in self.batches]
        pruned = self._add_pruned(upload, plan, rows)
        sent = upload.send(self.device)
        for batch, place in zip(self.batches, windows, strict=True):
            batch.upload(sent[place])
        num_rows = None
        if pruned:
            num_rows, self.starts, self.window_of, self.row_offsets = sent[pruned:]
        tier_lengths(
            input_batch.seq_lens[:count],
            input_batch.query_start_loc[: count + 1],
            sent[evicted],
            self._tier_of_group,
            self._tables.input_block_table_ptrs,
            self._tables.block_table_strides,
            self.tier_lens[:, : input_batch.num_reqs_after_padding],
            slots,
            block_size=self._block_size,
            num_rows=num_rows,
            row_starts=self.starts,
        )
        if self.group_queries is not None:
            self.group_queries.begin_step(rows)

    def _add_pruned(
        self, upload: _Upload, plan: StepPlan, rows: BatchRows
    ) -> int | None:
        """Add what only steps that prune rows need; the place of the first of them."""
        if not plan.prunes:
            return None
        windows = [window for batch in self.batches for window in batch.windows]
        window_of = np.full(rows.num_rows.shape, -1, dtype=np.int32)
        offsets = np.zeros((self.num_tiers, len(windows)), dtype=np.int32)
        place = 0
        for batch in self.batches:
            for column, window in enumerate(batch.windows):
                for tier in range(self.num_tiers - 1):
                    stay, now = window.num_rows(tier + 1), window.num_rows(tier)
                    before = window.num_held(tier) - now
                    offsets[tier, place] = batch.offsets[tier, column] + before
                    if stay < now:
                        window_of[tier, window.row] = place
                place += 1
        first = upload.add(rows.num_rows.numpy())
        upload.add(rows.starts.numpy())
        upload.add(window_of)
        upload.add(offsets)
        return first

    def for_tier(
        self, tier: int, common: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """The metadata with the tier's lengths; its slots have been rewritten."""
        lens = self.tier_lens[tier, : common.num_reqs]
        tiered = copy.copy(common)
        tiered.seq_lens = lens
        if self._plan is None:
            # Warm-up and capture: a replay reads these lengths where they lie now.
            lens.copy_(common.seq_lens)
            return tiered
        rows = self.rows
        on_host = torch.zeros(common.num_reqs, dtype=torch.int32)
        on_host[: rows.seq_lens.shape[1]] = rows.seq_lens[tier]
        tiered.seq_lens_cpu_upper_bound = on_host
        tiered.max_seq_len = int(on_host.max())
        tiered._num_computed_tokens_cache = None
        if rows.is_pruned[tier]:
            assert self.starts is not None
            tiered.query_start_loc = self.starts[tier]
            tiered.query_start_loc_cpu = rows.starts[tier]
            tiered.num_actual_tokens = rows.total_rows[tier]
            tiered.max_query_len = int(rows.num_rows[tier].max())
            tiered._token_to_req_indices_cache = None
        return tiered
