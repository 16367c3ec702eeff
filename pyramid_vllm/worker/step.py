"""The current step: the plan, mapped to the rows of the runner's batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pyramid_vllm.kernels.scratch import Scratch
from pyramid_vllm.worker.evicted import EvictedTokens
from pyramid_vllm.worker.rows import BatchRows
from pyramid_vllm.worker.upload import Upload
from pyramid_vllm.worker.windows import WindowBatch, window_batches

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from pyramid_vllm.kernels.kernel_set import KernelSet
    from pyramid_vllm.plan import StepPlan
    from pyramid_vllm.policy import PolicyConfig
    from pyramid_vllm.worker.generated import GeneratedQueries
    from pyramid_vllm.worker.runners.adapter import RunnerAdapter
    from pyramid_vllm.worker.runners.batch import StepInputs


def _padded(lens: npt.NDArray[np.int32], size: int) -> Sequence[torch.Tensor]:
    """Each tier's ``[size]`` lengths; zeros pad them."""
    missing = size - lens.shape[1]
    if missing:
        lens = np.pad(lens, ((0, 0), (0, missing)))
    return torch.from_numpy(lens).unbind()


class TierStep:
    """The current step, shared by a worker's metadata builders and layers.

    Between ``begin`` and ``finish`` the plan holds; outside (profiling and warm-up
    steps) every tier is as in stock vLLM. Captured graphs read lengths from
    ``tier_lens`` and slots from the runner's own buffer: both are written before every
    replay.

    Args:
        block_size: tokens of a page.
        adapter: the runner's.
        runner: vLLM's.
        tier_of_group: tiers of its KV cache groups; groups of no tier are left out.
        policies: by the names that plans use.
        kernels: of the device.
    """

    def __init__(
        self,
        block_size: int,
        adapter: RunnerAdapter,
        runner: Any,
        tier_of_group: Mapping[int, int],
        policies: Mapping[str, PolicyConfig],
        kernels: KernelSet,
    ) -> None:
        self.block_size = block_size
        self.batch, self.kernels = adapter, kernels
        self.device: torch.device = runner.device
        self.scratch = Scratch(self.device)
        self._policies = policies
        self.num_tiers = max(tier_of_group.values()) + 1
        self._tier_of_group = torch.tensor(
            [tier_of_group.get(group, -1) for group in range(adapter.num_groups)],
            dtype=torch.int32,
            device=self.device,
        )
        self.tier_lens = torch.zeros(
            self.num_tiers, runner.max_num_reqs, dtype=torch.int32, device=self.device
        )
        self._views_of_lens: dict[int, tuple[torch.Tensor, Sequence[torch.Tensor]]] = {}
        self._evicted = EvictedTokens(
            self.num_tiers, runner.max_num_reqs, adapter, self.device
        )
        self.generated: GeneratedQueries | None = None
        """Queries of generated tokens; None: they are not scored."""
        self._plan: StepPlan | None = None
        self._rows: BatchRows | None = None
        self.shared: dict[Hashable, Any] = {}
        """Metadata that builders of tiers with the same lengths and rows share."""
        self.num_layers_done = 0
        """Layers that have handled this step's windows."""
        self._reset()

    def _reset(self) -> None:
        self._rows = None
        self._lens_on_host: Sequence[torch.Tensor] = ()
        self.shared.clear()
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
        """Start a step. The runner's batch is mapped once it is there."""
        self._reset()
        self._evicted.begin(plan)
        self._plan, self.num_layers_done = plan, 0

    def finish(self, num_layers: int) -> None:
        """End a step.

        Raises:
            RuntimeError: a layer that should have compacted did not run, or the
                step ran with the lengths of stock vLLM.
        """
        plan, rows, self._plan = self._plan, self._rows, None
        self._reset()
        if plan and plan.windows and self.num_layers_done != num_layers:
            raise RuntimeError(
                f"KV policy: {self.num_layers_done} of {num_layers} layers compacted "
                f"{[window.req_id for window in plan.windows]}"
            )
        if plan and plan.num_reqs and rows is None:
            raise RuntimeError(
                f"KV policy: no metadata of {plan.num_reqs} requests was built by tier"
            )
        if plan:
            self._evicted.finish(plan)

    @property
    def plan(self) -> StepPlan | None:
        """The step's plan; None outside of steps."""
        return self._plan

    @property
    def rows(self) -> BatchRows:
        """This step's rows, by tier."""
        assert self._rows is not None, "attention ran before its metadata was built"
        return self._rows

    def prepare(self, inputs: StepInputs) -> None:
        """Compute lengths, slots and windows, once the runner has its own slots.

        Args:
            inputs: of the runner; its slots are rewritten in place.
        """
        plan = self._plan
        if plan is None:
            return
        rows = self._rows = BatchRows(
            plan,
            self.batch,
            inputs.starts_on_host,
            inputs.seq_lens_on_host,
            self._evicted.rows(),
        )
        self._lens_on_host = _padded(rows.seq_lens, inputs.num_padded)
        if plan.windows:
            self.batches, self.num_scores = window_batches(
                plan.windows, rows, self._policies
            )
        upload = Upload()
        windows = [upload.add(batch.on_host) for batch in self.batches]
        targets = [self._add_targets(upload, batch) for batch in self.batches]
        pruned = self._add_pruned(upload, rows) if plan.prunes else None
        sent = upload.send(self.device)
        for batch, place, target in zip(self.batches, windows, targets, strict=True):
            batch.upload(sent[place], None if target is None else sent[target])
        num_rows = None
        if pruned:
            num_rows, self.starts, self.window_of, self.row_offsets = sent[pruned:]
        self.kernels.lengths(
            inputs.seq_lens,
            inputs.starts,
            self._evicted.rows_on_device(),
            self._tier_of_group,
            inputs.tables,
            self._lens(inputs.num_padded)[0],
            inputs.slots,
            block_size=self.block_size,
            num_rows=num_rows,
            row_starts=self.starts,
        )
        if self.generated is not None:
            self.generated.begin_step(rows)

    def _add_targets(self, upload: Upload, batch: WindowBatch) -> int | None:
        """Add the pages that a batch is gathered into, where it is not in place."""
        targets = batch.targets_on_host(self.batch.num_groups, self.block_size)
        return None if targets is None else upload.add(targets)

    def _lens(self, num_reqs: int) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """``tier_lens`` of the first requests, all and by tier: always the same views,
        for making them takes longer than a step's arithmetic."""
        views = self._views_of_lens.get(num_reqs)
        if views is None:
            lens = self.tier_lens[:, :num_reqs]
            views = self._views_of_lens[num_reqs] = (
                lens,
                [lens[tier] for tier in range(len(lens))],
            )
        return views

    def _add_pruned(self, upload: Upload, rows: BatchRows) -> int:
        """Add what only steps that prune rows need; the place of the first of them."""
        window_of = np.full(rows.num_rows.shape, -1, dtype=np.int32)
        offsets, place = [], 0
        for batch in self.batches:
            columns = batch.columns
            num_rows = columns.num_rows
            offsets.append(batch.offsets + columns.num_own - num_rows)
            places = np.arange(place, place + len(batch.windows))
            for tier in range(self.num_tiers - 1):
                narrows = num_rows[tier + 1] < num_rows[tier]
                window_of[tier, columns.row[narrows]] = places[narrows]
            place += len(batch.windows)
        first = upload.add(rows.num_rows)
        upload.add(rows.starts)
        upload.add(window_of)
        upload.add(np.concatenate(offsets, axis=1))
        return first

    def first_like(self, tier: int, common: CommonAttentionMetadata) -> int | None:
        """The first tier that has the lengths and rows of ``tier`` in this step; None:
        no step runs, and every tier's metadata is its own."""
        if self._plan is None:
            return None
        if self._rows is None:
            self.prepare(self.batch.inputs(common))
        return self.rows.first_like[tier]

    def for_tier(
        self, tier: int, common: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """The metadata with the tier's lengths; its slots are rewritten in place."""
        if self._plan is not None and self._rows is None:
            self.prepare(self.batch.inputs(common))
        lens = self._lens(common.num_reqs)[1][tier]
        # What `copy.copy` makes, in a tenth of its time.
        tiered = object.__new__(type(common))
        tiered.__dict__.update(common.__dict__)
        tiered.seq_lens = lens
        if self._plan is None:
            # Warm-up and capture: a replay reads these lengths where they lie now.
            lens.copy_(common.seq_lens)
            return tiered
        rows = self.rows
        on_host = self._lens_on_host[tier]
        if len(on_host) > common.num_reqs:
            on_host = on_host[: common.num_reqs]
        tiered.seq_lens_cpu_upper_bound = on_host
        tiered.max_seq_len = rows.max_lens[tier]
        tiered._num_computed_tokens_cache = None
        if rows.is_pruned[tier]:
            assert self.starts is not None
            tiered.query_start_loc = self.starts[tier]
            tiered.query_start_loc_cpu = torch.from_numpy(rows.starts[tier])
            tiered.num_actual_tokens = rows.total_rows[tier]
            tiered.max_query_len = int(rows.num_rows[tier].max())
            tiered._token_to_req_indices_cache = None
        return tiered
