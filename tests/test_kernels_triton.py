"""The Triton kernels, interpreted on the CPU, beside their torch references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramid_vllm.kernels import (
    accumulated_scores,
    compact,
    group_scores,
    key_norm_scores,
    pooled,
    score_triton,
    select_tokens,
    select_triton,
    vote_scores,
    window_scores,
)
from pyramid_vllm.kernels.compact_triton import compact_pages, gather_into_pages
from pyramid_vllm.kernels.lengths_triton import tier_lengths
from pyramid_vllm.kernels.prune_triton import gather_rows, row_indices, scatter_rows
from pyramid_vllm.kernels.queries_triton import count_missing, store_queries
from pyramid_vllm.kernels.requests_triton import INTERPRETED, PagedLayers, Spans
from tests.paging import FP8, LAYOUTS, Cache, Request, Shape, ones, queries_of

if not INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

UNTOUCHED = -7.0
HALF, E4M3, E5M2 = torch.bfloat16, *FP8
SHORT = [1, 2, 15, 16, 17, 31, 32, 33, 100]


def scored(num_held: int, num_queries: int, **options: int) -> Request:
    return Request(num_held, num_queries=min(num_held, num_queries), **options)


def run_score(
    cache: Cache,
    group: int = 1,
    query_dtype: torch.dtype | None = None,
    ring: int | None = None,
    factor: float = 1.0,
    query_factor: float = 1.0,
    **options: object,
) -> tuple[torch.Tensor, Spans, list[list[torch.Tensor]]]:
    """Scores, where they lie, and the queries of each layer and request."""
    shape = cache.shape
    query, starts, queries = queries_of(cache, group, query_dtype or shape.dtype, ring)
    spans, (addresses, factors) = cache.spans(starts), ones(shape.num_layers, factor)
    out = torch.full((shape.num_layers, shape.num_heads, cache.num_scores), UNTOUCHED)
    # Layers need not lie in the order of their queries.
    order = torch.arange(shape.num_layers).flip(0)
    requests = cache.requests
    score_triton.score(
        query.flip(0),
        order,
        cache.paged(),
        cache.table,
        spans,
        out,
        max_queries=max(request.num_queries for request in requests),
        max_tokens=max(request.num_held for request in requests),
        max_columns=max(request.columns for request in requests),
        query_scale=torch.tensor([query_factor]),
        key_scales=addresses,
        ring=ring,
        scale=shape.head_size**-0.5,
        **options,
    )
    del factors
    scaled = [[q * query_factor for q in of_layer] for of_layer in queries]
    return out, spans, scaled


def expected_scores(
    cache: Cache,
    spans: Spans,
    queries: list[list[torch.Tensor]],
    factor: float = 1.0,
    kind: int = score_triton.ATTENTION,
    distance_weight: float = 1.0,
    logits_soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    shape = cache.shape
    out = torch.full((shape.num_layers, shape.num_heads, cache.num_scores), UNTOUCHED)
    for layer, of_layer in enumerate(queries):
        for i, request in enumerate(cache.requests):
            if not request.num_queries:
                continue
            key = cache.tokens(layer, i).float() * (factor + layer)
            sinks = None if sink_logits is None else sink_logits[layer]
            shared = (shape.head_size**-0.5, logits_soft_cap, sinks)
            if kind == score_triton.ATTENTION:
                values = window_scores(
                    of_layer[i], key, shared[0], distance_weight, *shared[1:]
                )
            elif kind == score_triton.ACCUMULATED:
                values = accumulated_scores(of_layer[i], key, *shared)
            else:
                values = vote_scores(of_layer[i], key, *shared)
            begin = int(spans.offset[i])
            columns = values[:, request.column : request.column + request.columns]
            out[layer, :, begin : begin + request.columns] = columns
    return out


def check_scores(cache: Cache, factor: float = 1.0, **options: object) -> None:
    out, spans, queries = run_score(cache, factor=factor, **options)
    for name in ("group", "query_dtype", "ring", "query_factor"):
        options.pop(name, None)
    expected = expected_scores(cache, spans, queries, factor, **options)
    torch.testing.assert_close(out, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF, *FP8])
def test_scores_of_any_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    """Eight-bit keys count by each layer's factor; requests may have no queries."""
    shape = Shape(2, 32, 16, layout, dtype)
    requests = [scored(33, 5), Request(20), scored(17, 64), Request(0)]
    cache = Cache(shape, requests)
    if dtype in FP8:
        check_scores(cache, 0.7, group=3, query_dtype=HALF, distance_weight=1.5)
    else:
        check_scores(cache, group=3, distance_weight=1.5)


def test_quantized_queries() -> None:
    cache = Cache(Shape(dtype=E4M3), [scored(40, 6)])
    check_scores(cache, 0.6, group=2, query_dtype=E4M3, query_factor=1.7)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
def test_scores_of_any_shape(head_size: int, group: int) -> None:
    shape = Shape(2, head_size, 32, "NHD", HALF, 1)
    cache = Cache(shape, [scored(70, 5), scored(31, 1)])
    check_scores(cache, group=group, distance_weight=2.0)


@pytest.mark.parametrize("num_queries", [1, 5, 64])
def test_scores_of_many_lengths_at_once(num_queries: int) -> None:
    cache = Cache(Shape(1), [scored(held, num_queries) for held in SHORT])
    check_scores(cache, group=2, distance_weight=1.3)


@pytest.mark.parametrize("held", [1000, 4097, 8192])
def test_scores_of_long_prompts(held: int) -> None:
    cache = Cache(Shape(1, num_layers=1), [scored(held, 256), scored(100, 256)])
    check_scores(cache, distance_weight=1.3)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("sizes", [(16, 16, 32), (32, 64, 64)])
def test_scores_of_small_blocks(
    kind: int, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: many rows of blocks, and keys in splits."""
    monkeypatch.setattr(score_triton, "_sizes", lambda *_: sizes[:2])
    monkeypatch.setattr(score_triton, "_split", lambda *_: sizes[2])
    cache = Cache(Shape(1), [scored(held, 19) for held in (1, 33, 90)])
    check_scores(cache, group=3, kind=kind)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_scores_of_all_kinds(kind: int, cap: float, sinks: bool) -> None:
    cache = Cache(Shape(2), [scored(50, 7), scored(16, 16)])
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    check_scores(
        cache,
        group=3,
        kind=kind,
        logits_soft_cap=cap,
        sink_logits=logits if sinks else None,
    )


def test_a_large_soft_cap_overflows_nothing() -> None:
    cache = Cache(Shape(2), [scored(50, 7)])
    for part in cache.keys:
        part *= 1000
    check_scores(cache, logits_soft_cap=3.0)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_scores_of_groups_from_rings(cap: float) -> None:
    """Those of ``group_scores``, of a range of columns."""
    ring, group_size = 8, 7
    requests = [
        scored(40, 8, ring_start=3, column=11, num_columns=group_size),
        scored(23, 1, ring_start=7, column=5, num_columns=group_size),
        scored(64, 5, ring_start=0, column=40, num_columns=group_size),
    ]
    cache = Cache(Shape(2), requests)
    options = {"distance_weight": 1.6, "logits_soft_cap": cap}
    check_scores(cache, group=3, ring=ring, **options)
    out, spans, queries = run_score(cache, group=3, ring=ring, **options)
    padded = torch.zeros(3, ring, 6, 32)
    keys = torch.zeros(3, 64, 2, 32)
    for i, request in enumerate(requests):
        padded[i, ring - request.num_queries :] = queries[1][i]
        keys[i, : request.num_held] = cache.tokens(1, i) * 2
    del queries
    expected = group_scores(
        padded,
        keys,
        torch.tensor([request.num_held for request in requests]),
        torch.tensor([request.num_queries for request in requests]),
        torch.tensor([request.column for request in requests]),
        group_size,
        32**-0.5,
        1.6,
        cap,
    )
    for i, begin in enumerate(spans.offset.tolist()):
        found = out[1, :, begin : begin + group_size]
        torch.testing.assert_close(found, expected[i], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, *FP8])
@pytest.mark.parametrize("head_size", [32, 80])
def test_key_norms(dtype: torch.dtype, head_size: int) -> None:
    requests = [Request(held) for held in (0, 1, 33, 300)]
    cache = Cache(Shape(2, head_size, 16, "NHD", dtype), requests)
    spans = cache.spans()
    out = torch.full((2, 2, cache.num_scores), UNTOUCHED)
    expected = out.clone()
    score_triton.score_key_norms(cache.paged(), cache.table, spans, out, max_tokens=300)
    for layer in range(2):
        for i, begin in enumerate(spans.offset.tolist()):
            norms = key_norm_scores(cache.tokens(layer, i).float())
            expected[layer, :, begin : begin + norms.shape[1]] = norms
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_pooling(kind: str, kernel: int) -> None:
    held = (0, 1, 2, 5, 33, 1030, 8)
    requests = [
        Request(n, num_recent=min(n, recent))
        for n, recent in zip(held, (0, 0, 1, 5, 4, 6, 8), strict=True)
    ]
    cache = Cache(Shape(), requests)
    spans = cache.spans()
    scores = torch.randn(2, 2, cache.num_scores)
    out = torch.full_like(scores, UNTOUCHED)
    expected = out.clone()
    score_triton.pool_scores(scores, out, spans, kind, kernel, max_tokens=1030)
    for request, begin in zip(requests, spans.offset.tolist(), strict=True):
        place = slice(begin, begin + request.num_held)
        for layer in range(2):
            part = pooled(scores[layer, :, place], request.num_recent, kind, kernel)
            expected[layer, :, place] = part
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def check_selection(scores: list[torch.Tensor], requests: list[Request]) -> None:
    """``scores``: of each request, ``[num_layers, num_groups, num_held]``."""
    cache = Cache(Shape(), requests)
    spans = cache.spans()
    layers, groups = scores[0].shape[:2]
    flat = torch.full((layers, groups, cache.num_scores), torch.nan)
    out = torch.full((layers, groups, cache.num_scores), -1, dtype=torch.int32)
    expected = out.clone()
    for request, part, begin in zip(
        requests, scores, spans.offset.tolist(), strict=True
    ):
        first, kept = request.column, request.num_kept
        flat[..., begin : begin + request.num_held - first] = part[..., first:]
        if kept == request.num_held:
            continue
        for layer in range(layers):
            chosen = select_tokens(
                part[layer], kept, request.num_first, request.num_recent
            )
            expected[layer, :, begin : begin + kept] = chosen
    most = max(request.num_held for request in requests)
    select_triton.select(flat, out, spans, max_tokens=most)
    assert torch.equal(out, expected)


def levels_of(num: int, levels: int, seed: int, layers: int = 2) -> torch.Tensor:
    """Scores with as many values: negative ones, and zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    if not levels:
        return torch.randn(layers, 2, num, generator=generator)
    scores = torch.randint(0, levels, (layers, 2, num), generator=generator).float()
    signs = torch.randint(0, 2, (layers, 2, num), generator=generator) * 2 - 1
    return (scores - levels // 2) * signs


@pytest.mark.parametrize("levels", [0, 1, 3, 1000])
def test_selection_of_many_requests(levels: int) -> None:
    """Of equal scores the newest stay; zero is minus zero; none wanted is none."""
    requests, scores = [], []
    for seed, held in enumerate((1, 2, 16, 17, 33, 1000)):
        first, recent = held // 10, held // 5
        for kept in {first + recent, (first + recent + held) // 2, held - 1, held}:
            if kept < first + recent:
                continue
            requests.append(Request(held, kept, first, recent))
            scores.append(levels_of(held, levels, seed, 1))
    check_selection(scores, requests)


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("held", [4095, 4096, 4097, 8192])
def test_selection_of_long_prompts(held: int, levels: int) -> None:
    """In one block, and in several."""
    requests = [Request(held, held // 3, 4, 64), Request(100, 50, 4, 10)]
    scores = [levels_of(request.num_held, levels, 7, 1) for request in requests]
    check_selection(scores, requests)


@pytest.mark.parametrize("block", [16, 64])
def test_selection_in_small_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_triton, "_BLOCK", block)
    requests, scores = [], []
    for seed, held in enumerate((16, 33, 65, 100)):
        for kept in (held // 2, held - 1):
            first = kept // 3
            requests.append(Request(held, kept, first, kept // 4))
            scores.append(levels_of(held, 3, seed, 1))
    check_selection(scores, requests)


def test_selection_of_groups() -> None:
    """Scores begin at the first token that has one."""
    requests = [
        Request(60, 51, 20, 30, column=20, num_columns=10),
        Request(33, 28, 11, 12, column=11, num_columns=10),
    ]
    check_selection(
        [levels_of(request.num_held, 4, 5) for request in requests], requests
    )


VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, float("-inf"), float("inf")]
)


@settings(max_examples=30)
@given(st.data())
def test_any_selection(data: st.DataObject) -> None:
    held = data.draw(st.integers(1, 40))
    row = data.draw(st.lists(VALUES, min_size=held, max_size=held))
    first = data.draw(st.integers(0, held))
    recent = data.draw(st.integers(0, held - first))
    kept = data.draw(st.integers(first + recent, held))
    check_selection(
        [torch.tensor(row)[None, None]], [Request(held, kept, first, recent)]
    )


def kept_of(cache: Cache, groups: int, seed: int) -> torch.Tensor:
    """Random tokens that stay; the first ones among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (cache.shape.num_layers, groups, cache.num_scores)
    kept = torch.zeros(shape, dtype=torch.int32)
    for request, begin in zip(
        cache.requests, cache.spans().offset.tolist(), strict=True
    ):
        first = request.num_first
        if request.num_kept == request.num_held:
            continue  # as `select` leaves it
        for row in kept.flatten(0, 1):
            order = torch.randperm(request.num_held - first, generator=generator)
            chosen = order[: request.num_kept - first].sort().values + first
            row[begin : begin + first] = torch.arange(first)
            row[begin + first : begin + request.num_kept] = chosen
    return kept


def randomize_bytes(cache: Cache, seed: int) -> None:
    """Any bits at all, such as those of values that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    for part in (*cache.keys, *cache.values):
        part = part.view(torch.uint8)
        part.copy_(torch.randint(0, 256, part.shape, generator=generator))


def check_compaction(cache: Cache, groups: int, seed: int = 0) -> None:
    randomize_bytes(cache, seed)
    kept, spans = kept_of(cache, groups, seed), cache.spans()
    expected = [
        [part.view(torch.uint8).clone() for part in parts]
        for parts in (cache.keys, cache.values)
    ]
    for layer in range(cache.shape.num_layers):
        for i, request in enumerate(cache.requests):
            begin, ids = int(spans.offset[i]), cache.block_ids(i)
            chosen = kept[layer, :, begin : begin + request.num_kept].long()
            if request.num_kept < request.num_held:
                compact(expected[0][layer], expected[1][layer], ids, ids, chosen)
    compact_pages(cache.paged(), cache.paged("values"), cache.table, spans, kept)
    for parts, found in zip(expected, (cache.keys, cache.values), strict=True):
        for part, of_layer in zip(parts, found, strict=True):
            assert torch.equal(of_layer.view(torch.uint8), part)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF, *FP8])
def test_compaction_of_any_layout_and_dtype(
    layout: str, dtype: torch.dtype, groups: int
) -> None:
    """Byte by byte, and nothing else is touched."""
    requests = [Request(40, 23, 4), Request(33, 33), Request(17, 0), Request(0)]
    check_compaction(Cache(Shape(2, 32, 16, layout, dtype), requests), groups)


@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_compaction_of_many_lengths_at_once(head_size: int) -> None:
    requests = [Request(held, held - held // 3, held // 9) for held in SHORT]
    check_compaction(Cache(Shape(2, head_size, 32, "NHD", HALF), requests), 2)


@pytest.mark.parametrize("held", [1000, 4097])
def test_compaction_of_long_prompts(held: int) -> None:
    """Over several blocks, whose ranges overlap."""
    requests = [Request(held, held - 1), Request(held, held // 2, 64)]
    check_compaction(Cache(Shape(1, 32, 16, "HND", HALF, 1), requests), 1)


@settings(max_examples=30)
@given(st.data())
def test_any_compaction(data: st.DataObject) -> None:
    held = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))
    requests = []
    for count in held:
        kept = data.draw(st.integers(0, count))
        requests.append(Request(count, kept, data.draw(st.integers(0, kept))))
    shape = Shape(2, 32, 16, data.draw(st.sampled_from(LAYOUTS)), HALF, 1)
    check_compaction(Cache(shape, requests), data.draw(st.sampled_from([1, 2])), 1)


def test_compaction_refuses_values_laid_out_otherwise() -> None:
    cache = Cache(Shape(), [Request(20, 10)])
    other = PagedLayers.of([part.contiguous() for part in cache.values])
    kept = torch.zeros(2, 1, cache.num_scores, dtype=torch.int32)
    with pytest.raises(ValueError, match="valid are those of the values"):
        compact_pages(cache.paged(), other, cache.table, cache.spans(), kept)


def test_layers_have_one_shape() -> None:
    wide, narrow = torch.zeros(3, 2, 16, 64), torch.zeros(3, 2, 16, 32)
    with pytest.raises(ValueError, match="valid are those of the other layers"):
        PagedLayers.of([wide, narrow])


def test_scores_refuse_other_dtypes() -> None:
    cache = Cache(Shape(dtype=torch.float64), [scored(20, 4)])
    with pytest.raises(ValueError, match=r"dtype=torch.float64: valid are torch.f"):
        run_score(cache, query_dtype=HALF)


@pytest.mark.parametrize("dtype", [HALF, E4M3])
def test_gathering_into_other_pages(dtype: torch.dtype) -> None:
    cache = Cache(Shape(dtype=dtype, layout="NHD"), [Request(40, 20), Request(40)])
    source = cache.tokens(0, 0).view(torch.uint8).clone()
    kept = torch.arange(0, 40, 2, dtype=torch.int32)[None]
    pages = cache.keys[0], cache.values[0]
    gather_into_pages(*pages, cache.block_ids(0), cache.block_ids(1), kept)
    moved = cache.tokens(0, 1).view(torch.uint8)[:20]
    assert torch.equal(moved, source[::2])
    assert torch.equal(cache.tokens(0, 0).view(torch.uint8), source)


class Lengths:
    """A batch's lengths, and what ``BatchRows`` would make of them."""

    max_requests, max_tokens, num_groups = 6, 400, 4
    tier_of_group = (2, 0, -1, 2)

    def __init__(self, num_requests: int, prunes: bool, block_size: int) -> None:
        generator = torch.Generator().manual_seed(num_requests)

        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            values = torch.randint(low, high, shape, generator=generator)
            return values.to(torch.int32)

        self.block_size, self.prunes = block_size, prunes
        self.scheduled = integers(0, 40, num_requests)
        if num_requests > 1:
            self.scheduled[1] = 300 if num_requests < 4 else 1
        self.seq_lens = self.scheduled + integers(20, 60, num_requests)
        self.starts = torch.zeros(num_requests + 1, dtype=torch.int32)
        self.starts[1:] = self.scheduled.cumsum(0)
        self.evicted = integers(0, 20, 3, num_requests)
        self.num_rows = self.scheduled.expand(3, -1).clone()
        if prunes:
            # Of other tiers other rows; of the first all.
            dropped = integers(0, 10, 3, num_requests).minimum(self.num_rows)
            dropped[0] = 0
            self.num_rows -= dropped
        self.row_starts = torch.zeros(3, num_requests + 1, dtype=torch.int32)
        self.row_starts[:, 1:] = self.num_rows.cumsum(1)
        blocks = -(-400 // block_size)
        self.tables = [
            torch.randperm(blocks * 8, generator=generator).int().view(8, -1)
            for _ in range(self.num_groups)
        ]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        lens = torch.full((3, self.max_requests), -5, dtype=torch.int32)
        slots = torch.full((self.num_groups, self.max_tokens), -9)
        for group, tier in enumerate(self.tier_of_group):
            if tier < 0:
                continue
            lens[tier] = 0
            rows, place = self.num_rows[tier], 0
            held = self.seq_lens - self.evicted[tier] - (self.scheduled - rows)
            lens[tier, : len(rows)] = held
            for request, (count, end) in enumerate(
                zip(rows.tolist(), held.tolist(), strict=True)
            ):
                for position in range(end - count, end):
                    block = self.tables[group][request, position // self.block_size]
                    offset = position % self.block_size
                    slots[group, place] = int(block) * self.block_size + offset
                    place += 1
            if self.prunes:
                slots[group, place:] = -1
        return lens, slots

    def write(self, lens: torch.Tensor, slots: torch.Tensor) -> None:
        tier_lengths(
            self.seq_lens,
            self.starts,
            self.evicted,
            torch.tensor(self.tier_of_group, dtype=torch.int32),
            torch.tensor([t.data_ptr() for t in self.tables], dtype=torch.uint64),
            torch.tensor([t.stride(0) for t in self.tables]),
            lens,
            slots,
            block_size=self.block_size,
            num_rows=self.num_rows if self.prunes else None,
            row_starts=self.row_starts if self.prunes else None,
        )


@pytest.mark.parametrize("prunes", [False, True])
@pytest.mark.parametrize("num_requests", [1, 2, 5, 6])
@pytest.mark.parametrize("block_size", [16, 32])
def test_lengths_and_slots(prunes: bool, num_requests: int, block_size: int) -> None:
    """Tiers of no group, groups of no tier and slots of no row stay; twice is once."""
    batch = Lengths(num_requests, prunes, block_size)
    expected_lens, expected_slots = batch.expected()
    assert int(batch.starts[-1]) < batch.max_tokens
    lens = torch.full_like(expected_lens, -5)
    slots = torch.full_like(expected_slots, -9)
    for _ in range(2):
        batch.write(lens, slots)
        assert torch.equal(lens, expected_lens)
        assert torch.equal(slots, expected_slots)


def test_indices_of_rows() -> None:
    """Of pruned requests the rows that were selected, of others the first ones."""
    counts, kept_counts = [5, 300, 1, 40], [5, 280, 0, 7]
    starts = torch.tensor([0, 5, 305, 306, 346], dtype=torch.int32)
    next_starts = torch.tensor([0, 5, 285, 285, 292], dtype=torch.int32)
    window_of = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    offset = torch.tensor([300, 2], dtype=torch.int32)
    kept = torch.full((350,), -1, dtype=torch.int32)
    chosen = {3: torch.arange(3, 17, 2), 1: torch.arange(20, 300)}
    kept[300:307], kept[2:282] = chosen[3].int(), chosen[1].int()
    out = torch.full((295,), -1, dtype=torch.int32)
    row_indices(starts, next_starts, window_of, kept, offset, out)
    expected = [
        int(starts[i]) + chosen.get(i, torch.arange(counts[i]))[:count]
        for i, count in enumerate(kept_counts)
    ]
    assert out[:292].tolist() == torch.cat(expected).tolist()
    assert out[292:].tolist() == [-1] * 3


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.int64])
@pytest.mark.parametrize("width", [1, 7, 64, 1500])
def test_moving_rows(dtype: torch.dtype, width: int) -> None:
    source = (torch.randn(20, width + 3) * 100).to(dtype)[:, :width]
    index = torch.tensor([0, 3, 4, 11, 19], dtype=torch.int32)
    rows = gather_rows(source, index)
    assert torch.equal(rows, source[index.long()])
    whole = torch.zeros(20, width, dtype=dtype)
    whole[index.long()] = rows
    assert torch.equal(scatter_rows(rows, index, 20), whole)
    assert gather_rows(source, index[:0]).shape == (0, width)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, E4M3])
def test_stored_queries(dtype: torch.dtype) -> None:
    query = torch.randn(6, 3 * 40 + 5).to(dtype)[:, : 3 * 40].unflatten(1, (3, 40))
    target = torch.tensor([4, -1, 0, 7, -1, 2, 99], dtype=torch.int32)
    positions = torch.tensor([40, 1, 10, 70, 1, 20, 5], dtype=torch.int32)
    out_dtype = HALF if dtype == E4M3 else dtype
    out = torch.full((9, 3, 40), UNTOUCHED, dtype=out_dtype)
    tags = torch.full((9,), -1, dtype=torch.int32)
    expected, expected_tags = out.clone(), tags.clone()
    factor = 0.5 if dtype == E4M3 else 1.0
    store_queries(query, target, positions, torch.tensor([factor]), out, tags)
    for row in (0, 2, 3, 5):
        expected[target[row]] = (query[row].float() * factor).to(out_dtype)
        expected_tags[target[row]] = positions[row]
    assert torch.equal(out, expected)
    assert torch.equal(tags, expected_tags)


def test_missing_queries_are_counted() -> None:
    """A query is there if its place bears its position, in every layer."""
    ring = 6
    tags = torch.full((2, 3 * ring), -1, dtype=torch.int32)
    requests = [
        Request(50, num_queries=4, ring_start=5),
        Request(50, num_queries=6, ring_start=2),
        Request(50),
    ]
    first = torch.tensor([41, 100, 7], dtype=torch.int32)
    spans = Cache(Shape(), requests).spans([0, ring, 2 * ring])
    for i, request in enumerate(requests):
        for place in range(request.num_queries):
            at = i * ring + (request.ring_start + place) % ring
            tags[:, at] = int(first[i]) + place
    missing = torch.tensor([3], dtype=torch.int32)
    count_missing(tags, spans, first, missing, ring)
    assert missing.item() == 3
    tags[1, 0] += 1
    tags[0, ring + 3] -= 6
    count_missing(tags, spans, first, missing, ring)
    assert missing.item() == 5
