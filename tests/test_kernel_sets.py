"""The two kernel sets give the same: torch loops beside interpreted Triton kernels."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pyramid_vllm.kernels import on_torch, on_triton
from pyramid_vllm.kernels.requests_triton import INTERPRETED
from pyramid_vllm.kernels.scratch import Scratch
from pyramid_vllm.kernels.spans import Attention, BlockTables, Spans
from pyramid_vllm.policy import SCORERS, PolicyConfig, resolve_policy
from tests.parity.paging import Cache, Request, Shape, queries_of

if not INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

SETS = (on_torch, on_triton)
LAYOUTS = ("HND", "NHD")
REQUESTS = [
    Request(40, num_kept=17, num_first=4, num_recent=5, num_queries=5),
    Request(20, num_kept=20),
    Request(65, num_kept=40, num_first=2, num_recent=16, num_queries=16),
    Request(33, num_kept=30, num_first=4, num_recent=1, num_queries=1),
]


def policy(**settings: Any) -> PolicyConfig:
    found = resolve_policy("pyramid", settings)
    assert found is not None
    return found


def on_host(spans: Spans) -> Any:
    return torch.stack(spans).numpy()


def scores_of(
    kernels: Any,
    requests: list[Request],
    config: PolicyConfig,
    layout: str = "HND",
    sinks: bool = False,
    ring: int | None = None,
) -> tuple[torch.Tensor, Spans]:
    """Scores from the same numbers, whatever the kernels."""
    torch.manual_seed(0)
    shape = Shape(layout=layout)
    cache = Cache(shape, requests)
    query, starts, _ = queries_of(cache, 3, shape.dtype, ring)
    spans = cache.spans(starts)
    out = torch.zeros(shape.num_layers, shape.num_heads, cache.num_scores)
    factor = torch.ones(1)
    logits = [torch.randn(3 * shape.num_heads) for _ in range(shape.num_layers)]
    attention = Attention(
        scale=0.3,
        logits_soft_cap=5.0,
        sink_logits=logits if sinks else None,
        query_scale=factor,
        key_scales=torch.tensor([factor.data_ptr()] * shape.num_layers),
    )
    kernels.score(
        config,
        attention,
        query,
        torch.arange(shape.num_layers),
        cache.paged(),
        cache.table,
        spans,
        out,
        max_queries=16,
        max_tokens=65,
        max_columns=65,
        ring=ring,
    )
    return out, spans


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_scores(scorer: str, sinks: bool, layout: str) -> None:
    config = policy(scorer=scorer, distance_weight=1.5, queries=None)
    (ours, spans), (theirs, _) = (
        scores_of(kernels, REQUESTS, config, layout, sinks) for kernels in SETS
    )
    for i, request in enumerate(REQUESTS):
        if config.needs_queries and not request.num_queries:
            continue
        own = slice(int(spans.offset[i]), int(spans.offset[i]) + request.num_held)
        left, right = ours[..., own], theirs[..., own]
        if config.scoring.is_same_for_all_heads:
            # Numbers that rise with the token: their differences alone count.
            left, right = left[:, :1].diff(), right[:, :1].diff()
        assert left.abs().sum() > 0
        torch.testing.assert_close(left, right, rtol=2e-4, atol=2e-6)


def test_scores_of_columns_by_queries_in_a_ring() -> None:
    requests = [
        Request(40, num_queries=8, ring_start=3, column=11, num_columns=7),
        Request(23, num_queries=1, ring_start=7, column=5, num_columns=7),
        Request(64, num_queries=5, column=40, num_columns=7),
    ]
    (ours, spans), (theirs, _) = (
        scores_of(kernels, requests, policy(), ring=8) for kernels in SETS
    )
    for offset in spans.offset.tolist():
        own = slice(offset, offset + 7)
        assert ours[..., own].sum() > 0
        torch.testing.assert_close(ours[..., own], theirs[..., own])


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_pooling(kind: str) -> None:
    cache = Cache(Shape(), REQUESTS)
    scores = torch.rand(2, 2, cache.num_scores)
    results = []
    for kernels in SETS:
        out = torch.zeros_like(scores)
        kernels.pool(scores, out, cache.spans(), kind, 5, max_columns=65)
        results.append(out)
    assert not torch.equal(results[0], scores)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("levels", [3, 1 << 20])
def test_selection_and_compaction(levels: int) -> None:
    """Scores of few levels have ties. Compaction is in place and into other pages."""
    results = []
    for kernels in SETS:
        cache = Cache(Shape(layout="NHD"), REQUESTS)
        generator = torch.Generator().manual_seed(levels)
        size = (2, 2, cache.num_scores)
        scores = torch.randint(0, levels, size, generator=generator).float()
        kept, spans = torch.zeros(size, dtype=torch.int32), cache.spans()
        kernels.select(scores, kept, spans, max_tokens=65)
        keys, values = cache.paged(), cache.paged("values")
        kernels.compact(keys, values, cache.table, spans, kept)
        results.append((kept, *cache.keys, *cache.values))
    untouched = Cache(Shape(layout="NHD"), REQUESTS)
    assert not torch.equal(results[0][1], untouched.keys[0])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("is_ordered", [True, False])
def test_compaction_into_other_pages(is_ordered: bool) -> None:
    """First tokens move too, except those in a shared page. Pages of another request
    are written, or the request's own last ones, whose tokens are still to be read."""
    results = []
    for kernels in SETS:
        requests = [Request(90, 40, 16, column=16, num_columns=74), Request(60)]
        cache = Cache(Shape(), requests)
        kept = torch.zeros(2, 2, cache.num_scores, dtype=torch.int32)
        start = cache.offsets[0]
        kept[..., start : start + 24] = torch.arange(18, 90, 3)
        before = [cache.tokens(layer, 0).clone() for layer in range(2)]
        targets = torch.full((2, 6), -1, dtype=torch.int32)
        pages = cache.block_ids(1)[:2] if is_ordered else cache.block_ids(0)[-2:]
        targets[0, 1:3] = pages
        kernels.compact(
            cache.paged(),
            cache.paged("values"),
            cache.table,
            cache.spans(),
            kept,
            targets,
            scratch=None if is_ordered else Scratch(torch.device("cpu")),
        )
        cache.table[cache.rows[0], 1:3] = pages
        for layer, old in enumerate(before):
            now = cache.tokens(layer, 0)[:40]
            assert torch.equal(now[:16], old[:16])
            assert torch.equal(now[16:], old[18::3])
        results.append(cache.keys + cache.values)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prunes", [False, True])
def test_lengths_and_slots(prunes: bool) -> None:
    """They change where a tier differs from stock vLLM; other slots stay as the
    runner's."""
    scheduled = torch.tensor([1, 40, 7], dtype=torch.int32)
    starts = torch.tensor([0, 1, 41, 48], dtype=torch.int32)
    seq_lens = torch.tensor([90, 70, 7], dtype=torch.int32)
    evicted = torch.tensor([[0, 0, 0], [30, 8, 0]], dtype=torch.int32)
    num_rows = torch.stack((scheduled, scheduled - torch.tensor([0, 25, 2]).int()))
    row_starts = torch.zeros(2, 4, dtype=torch.int32)
    row_starts[:, 1:] = num_rows.cumsum(1)
    tables = [torch.randperm(60).int().view(3, 20) for _ in range(3)]
    results = []
    for kernels in SETS:
        lens = torch.full((2, 4), -5, dtype=torch.int32)
        slots = torch.full((3, 48), -9)
        given: dict[str, Any] = {"block_size": 16}
        if prunes:
            given |= {"num_rows": num_rows, "row_starts": row_starts}
        kernels.lengths(
            seq_lens,
            starts,
            evicted,
            torch.tensor([1, -1, 1], dtype=torch.int32),
            BlockTables.of(tables),
            lens,
            slots,
            **given,
        )
        results.append((lens[1], slots))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert (results[0][1][1] == -9).all()
    assert (results[0][1][0] == -1).sum() == (27 if prunes else 0)


@pytest.mark.parametrize("kernels", SETS)
def test_rows_of_the_next_tier(kernels: ModuleType) -> None:
    starts = torch.tensor([0, 5, 8, 18], dtype=torch.int32)
    next_starts = torch.tensor([0, 5, 7, 11], dtype=torch.int32)
    kept = torch.tensor([9, 9, 0, 2, 5, 8, 1, 2], dtype=torch.int32)
    window_of = torch.tensor([-1, 1, 0], dtype=torch.int32)
    offset = torch.tensor([2, 6], dtype=torch.int32)
    index = torch.empty(11, dtype=torch.int32)
    kernels.row_indices(starts, next_starts, window_of, kept, offset, index)
    assert index.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 10, 13, 16]
    rows = torch.randn(18, 7)
    some = kernels.gather_rows(rows, index)
    assert torch.equal(some, rows[index.long()])
    whole = kernels.scatter_rows(some, index, 18)
    assert torch.equal(whole[index.long()], some)
    assert np.flatnonzero(whole.any(dim=1)).tolist() == index.tolist()


@pytest.mark.parametrize("kernels", SETS)
def test_queries_in_rings(kernels: ModuleType) -> None:
    """A query lies at its place, with its position; missing queries are counted."""
    ring, query = 4, torch.randn(3, 2, 8)
    target = torch.tensor([5, -1, 2, 99], dtype=torch.int32)
    positions = torch.tensor([21, 7, 14, 99], dtype=torch.int32)
    buffer, tags = torch.zeros(8, 2, 8), torch.full((2, 8), -1, dtype=torch.int32)
    for layer in range(2):
        kernels.store_queries(
            query, target, positions, torch.ones(1), buffer, tags[layer]
        )
    assert torch.equal(buffer[[5, 2]], query[[0, 2]])
    assert buffer.any(dim=(1, 2)).sum() == 2
    requests = [
        Request(50, num_queries=1, ring_start=2),
        Request(50, num_queries=2, ring_start=1),
        Request(50),
    ]
    spans = Cache(Shape(), requests).spans([0, ring, 0])
    missing = torch.tensor([3], dtype=torch.int32)
    first = torch.tensor([14, 21, 0], dtype=torch.int32)
    kernels.count_missing(tags, spans, first, missing, ring)
    # The second request's newer query, in both layers.
    assert missing.item() == 5
