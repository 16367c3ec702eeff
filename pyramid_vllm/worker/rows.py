"""Block-table rows of vLLM's V1 runner after a compaction."""

from collections.abc import Mapping
from typing import Any

from vllm.utils.math_utils import cdiv

from pyramid_vllm.plan import StepPlan


def truncate_rows(
    runner: Any, tier_of_group: Mapping[int, int], plan: StepPlan
) -> None:
    """Cut compacted requests' rows to the pages that they keep.

    The scheduler has freed the pages behind; the next ones it allocates are appended.
    """
    for window in plan.windows:
        if window.num_kept is None:
            continue
        row = runner.input_batch.req_id_to_index[window.req_id]
        block_ids = runner.requests[window.req_id].block_ids
        for group_id, tier in tier_of_group.items():
            table = runner.input_batch.block_table[group_id]
            num_kept = cdiv(window.num_kept[tier], table.block_size)
            table.block_table.np[row, num_kept : table.num_blocks_per_row[row]] = 0
            table.num_blocks_per_row[row] = num_kept
            del block_ids[group_id][num_kept:]
