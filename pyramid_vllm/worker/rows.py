"""Block-table rows of vLLM's V1 runner after a compaction."""

from collections.abc import Mapping
from typing import Any

from vllm.utils.math_utils import cdiv

from pyramid_vllm.plan import StepPlan


def truncate_rows(
    runner: Any, tier_of_group: Mapping[int, int], plan: StepPlan
) -> None:
    """Cut compacted requests' rows to the pages that they keep, or replace them by
    those that their tokens were gathered into.

    The scheduler has freed the other pages; the next ones it allocates are appended.
    """
    gathered = {window.req_id: window.pages for window in plan.windows if window.pages}
    for req_id, num_kept in plan.cache_lengths.items():
        row = runner.input_batch.req_id_to_index[req_id]
        block_ids = runner.requests[req_id].block_ids
        for group_id, tier in tier_of_group.items():
            table = runner.input_batch.block_table[group_id]
            num_blocks = cdiv(num_kept[tier], table.block_size)
            pages = gathered[req_id][tier] if req_id in gathered else None
            if pages is not None:
                table.block_table.np[row, :num_blocks] = pages
                block_ids[group_id][:num_blocks] = pages
            table.block_table.np[row, num_blocks : table.num_blocks_per_row[row]] = 0
            table.num_blocks_per_row[row] = num_blocks
            del block_ids[group_id][num_blocks:]
