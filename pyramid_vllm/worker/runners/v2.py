"""vLLM's V2 model runner: the order of its rows, its block tables, its graphs.

Cause of the wrapped methods: the runner has no hook between its slots and its metadata,
and none that keeps a step out of a captured graph. They are wrapped on the one runner
of an engine with a policy. Removal: see ``patches/``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d

from pyramid_vllm.kernels.spans import BlockTables
from pyramid_vllm.worker.runners.batch import Prepare, StepInputs, row_changes

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from pyramid_vllm.plan import StepPlan


def _append_by_group(tables: Any) -> None:
    """Let the runner append new pages in those groups alone that have some.

    Tiers need a page in different steps, and vLLM looks at all groups each time.

    Args:
        tables: the runner's block tables.
    """
    append, groups = tables.append_block_ids, []
    for group_id, table in enumerate(tables.block_tables):
        only = copy.copy(tables)
        only.num_kv_cache_groups, only.block_tables = 1, [table]
        num_blocks = tables.num_blocks.np[group_id : group_id + 1]
        only.num_blocks = SimpleNamespace(np=num_blocks)
        groups.append(only)

    def append_block_ids(
        req_index: int, new_block_ids: tuple[list[int], ...], overwrite: bool
    ) -> None:
        # Elastic expert parallelism redirects the writes of a running engine's warm-up.
        if overwrite or getattr(tables, "redirect_writes_to_null_block", False):
            append(req_index, new_block_ids, overwrite)
            return
        for only, block_ids in zip(groups, new_block_ids, strict=True):
            if block_ids:
                only.append_block_ids(req_index, (block_ids,), overwrite)

    tables.append_block_ids = append_block_ids


class V2Runner:
    """What the policy needs of the runner; see ``RunnerAdapter`` and ``Batch``.

    Args:
        runner: vLLM's V2 runner, once its cache is allocated.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.prepare: Prepare | None = None
        """Called between the runner's slots and its metadata."""
        self._plan: StepPlan | None = None
        self._tables: Sequence[torch.Tensor] = ()
        self._row_of: dict[str, int] | None = None
        self._input_batch: Any = None
        self._wrap()

    def _wrap(self) -> None:
        runner = self._runner
        gather, prepare = runner.gather_batch_req_state, runner.prepare_attn
        dispatch = runner.cudagraph_manager.dispatch

        def gather_batch_req_state(*args: Any, **kwargs: Any) -> tuple[Any, int | None]:
            state, uniform_count = gather(*args, **kwargs)
            return state, None if self._needs_python else uniform_count

        def prepare_attn(input_batch: Any) -> tuple[Sequence[torch.Tensor], Any]:
            tables, slots = prepare(input_batch)
            self.begin_attention(input_batch, tables, slots)
            return tables, slots

        def dispatch_eagerly(*args: Any, **kwargs: Any) -> Any:
            desc = dispatch(*args, **kwargs)
            return self._eager(desc, *args, **kwargs) if self._prunes else desc

        _append_by_group(runner.block_tables)
        runner.gather_batch_req_state = gather_batch_req_state
        runner.prepare_attn = prepare_attn
        runner.cudagraph_manager.dispatch = dispatch_eagerly

    @property
    def _needs_python(self) -> bool:
        """Whether layers handle windows: a replayed graph would pass them over."""
        return self._plan is not None and bool(self._plan.windows)

    @property
    def _prunes(self) -> bool:
        """Whether the rows of a step change from layer to layer: no graph has that."""
        return self._plan is not None and self._plan.prunes

    @staticmethod
    def _eager(
        desc: Any, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """The descriptor that vLLM takes where no graph fits."""
        return type(desc)(
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_active_loras=desc.num_active_loras,
            num_ubatches=desc.num_ubatches,
        )

    def begin_attention(
        self, input_batch: Any, tables: Sequence[torch.Tensor], slots: torch.Tensor
    ) -> None:
        """Between the runner's slots and its metadata.

        Args:
            input_batch: the runner's.
            tables: block tables, by cache group.
            slots: ``[num_groups, num_tokens]``, int64: rewritten in place.
        """
        self._input_batch, self._tables = input_batch, tables
        self._row_of = None
        if self.prepare is not None:
            self.prepare(self._inputs(input_batch, tables, slots))

    def _inputs(
        self, input_batch: Any, tables: Sequence[torch.Tensor], slots: torch.Tensor
    ) -> StepInputs:
        count, num_padded = input_batch.num_reqs, input_batch.num_reqs_after_padding
        of_runner = self._runner.block_tables
        starts, seq_lens = input_batch.query_start_loc, input_batch.seq_lens
        if count < num_padded:
            starts, seq_lens = starts[: count + 1], seq_lens[:count]
        return StepInputs(
            starts=starts,
            starts_on_host=input_batch.query_start_loc_np[: count + 1],
            seq_lens=seq_lens,
            seq_lens_on_host=input_batch.seq_lens_cpu_upper_bound.numpy()[:count],
            num_padded=num_padded,
            tables=BlockTables(
                tables,
                of_runner.input_block_table_ptrs,
                of_runner.block_table_strides,
            ),
            slots=slots,
        )

    def inputs(self, common: CommonAttentionMetadata) -> StepInputs:
        """The runner builds no metadata before ``prepare``."""
        raise RuntimeError("KV policy: metadata was built before its lengths")

    @property
    def num_groups(self) -> int:
        """KV cache groups."""
        num_groups: int = self._runner.block_tables.num_kv_cache_groups
        return num_groups

    @property
    def req_ids(self) -> Sequence[str]:
        """By row."""
        return self._input_batch.req_ids

    @property
    def row_of(self) -> Mapping[str, int]:
        """Row of each request, mapped where a step has windows."""
        if self._row_of is None:
            req_ids = self._input_batch.req_ids
            self._row_of = {req_id: row for row, req_id in enumerate(req_ids)}
        return self._row_of

    @property
    def num_computed(self) -> npt.NDArray[np.int32]:
        """Computed tokens before this step."""
        return self._input_batch.num_computed_tokens_np

    @property
    def num_prompt(self) -> npt.NDArray[np.int32]:
        """Prompt tokens."""
        states = self._runner.req_states
        return states.prompt_len.np[self._input_batch.idx_mapping_np]

    @property
    def slots(self) -> npt.NDArray[np.intp]:
        """The runner's own places of requests."""
        return self._input_batch.idx_mapping_np

    @property
    def slots_on_device(self) -> torch.Tensor:
        """The same, on the device."""
        return self._input_batch.idx_mapping

    def slot_of(self, req_id: str) -> int:
        """The slot of a request."""
        slot: int = self._runner.req_states.req_id_to_index[req_id]
        return slot

    def release(self, req_id: str) -> int | None:
        """The runner frees its slots itself, later in the step."""
        return self._runner.req_states.req_id_to_index.get(req_id)

    def pages(self, group_id: int) -> torch.Tensor:
        """A cache group's block table."""
        return self._tables[group_id]

    def kernel_block_size(self, group_id: int) -> int:
        """Tokens of the blocks that a group's kernels see."""
        return self._runner.kernel_block_sizes[group_id]

    def begin(self, plan: StepPlan) -> None:
        """Before the runner's step."""
        self._plan = plan

    def after_forward(self) -> None:
        """Between the forward pass and sampling."""
        self._plan = None

    def truncate(self, tier_of_group: Mapping[int, int], plan: StepPlan) -> int:
        """Cut compacted requests' rows to the pages that they keep, or replace them by
        those that their tokens were gathered into.

        The runner publishes rows and their lengths before its next step.
        """
        num_fewer, tables = 0, self._runner.block_tables
        sizes = {group: tables.block_sizes[group] for group in tier_of_group}
        for change in row_changes(plan, tier_of_group, sizes):
            index = self._runner.req_states.req_id_to_index[change.req_id]
            group, end = change.group, change.num_blocks
            num_fewer += int(tables.num_blocks.np[group, index]) - end
            if change.pages:
                # At once: a staged write may meet the next request's in this row.
                row = tables.block_tables[group].gpu[index, change.first : end]
                async_tensor_h2d(list(change.pages), dtype=row.dtype, out=row)
            tables.num_blocks.np[group, index] = end
        return num_fewer
