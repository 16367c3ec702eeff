"""New pages of tiers in the V2 runner's block tables."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.block_table import BlockTables

from pyramid_vllm.worker.runners.v2 import V2Runner

NUM_GROUPS, NUM_REQS, ROW = 3, 4, 5


class _Table:
    """A table of one group, which notes what is written."""

    def __init__(self) -> None:
        self.gpu = torch.zeros(NUM_REQS, ROW, dtype=torch.int32)
        self.writes: list[tuple[int, int, list[int]]] = []

    def stage_write(self, index: int, start: int, block_ids: list[int]) -> None:
        self.writes.append((index, int(start), block_ids))


def _tables() -> Any:
    tables = object.__new__(BlockTables)
    tables.num_kv_cache_groups = NUM_GROUPS
    tables.block_tables = [_Table() for _ in range(NUM_GROUPS)]
    counts = np.zeros((NUM_GROUPS, NUM_REQS), dtype=np.int32)
    tables.num_blocks = SimpleNamespace(np=counts)
    return tables


def _wrapped(tables: Any) -> Any:
    """As a runner's with a policy."""
    V2Runner(
        SimpleNamespace(
            block_tables=tables,
            gather_batch_req_state=None,
            prepare_attn=None,
            cudagraph_manager=SimpleNamespace(dispatch=None),
        )
    )
    return tables


def test_pages_are_appended_as_by_vllm_in_the_groups_that_have_some() -> None:
    stock, ours = _tables(), _wrapped(_tables())
    for tables in (stock, ours):
        tables.append_block_ids(2, ([1, 2], [3], [4]), overwrite=True)
        tables.append_block_ids(2, ([], [5], []), overwrite=False)
        tables.append_block_ids(2, ([6], [], [7, 8]), overwrite=False)
    assert np.array_equal(ours.num_blocks.np, stock.num_blocks.np)
    assert ours.num_blocks.np[:, 2].tolist() == [3, 2, 3]
    pairs = list(zip(ours.block_tables, stock.block_tables, strict=True))
    for mine, theirs in pairs:
        assert mine.writes == [write for write in theirs.writes if write[2]]
    # vLLM itself asks every table for every group.
    assert sum(len(theirs.writes) for _, theirs in pairs) == 3 * NUM_GROUPS
    assert sum(len(mine.writes) for mine, _ in pairs) == NUM_GROUPS + 3


def test_a_row_that_is_full_is_an_error_of_vllms() -> None:
    tables = _wrapped(_tables())
    tables.append_block_ids(0, ([1], [1], [1]), overwrite=True)
    with pytest.raises(RuntimeError, match="exceeds row capacity"):
        tables.append_block_ids(0, ([], list(range(ROW)), []), overwrite=False)
