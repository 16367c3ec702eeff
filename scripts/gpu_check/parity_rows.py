"""Kernels of lengths, slots, rows and kept queries, beside plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from gpu_check.compared import Case, Compared, all_of, exactly
from gpu_check.paged import Pages, Request, Shape
from gpu_check.parity_scores import FP8
from pyramid_vllm.kernels.lengths_triton import tier_lengths
from pyramid_vllm.kernels.prune_triton import gather_rows, row_indices, scatter_rows
from pyramid_vllm.kernels.queries_triton import count_missing, store_queries

_TIER_OF_GROUP = (2, 0, -1, 2)
_MAX_REQUESTS, _MAX_TOKENS = 6, 400


class _Batch:
    """Lengths of a batch: scheduled, held, evicted, and rows of each tier."""

    def __init__(self, num_requests: int, prunes: bool, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed + num_requests)
        self.prunes = prunes
        self.scheduled = self.integers(0, 60, num_requests)
        self.held = self.scheduled + self.integers(20, 60, num_requests)
        self.evicted = self.integers(0, 20, 3, num_requests)
        self.rows = self.scheduled.expand(3, -1).clone()
        if prunes:
            dropped = self.integers(0, 10, 3, num_requests).minimum(self.rows)
            dropped[0] = 0
            self.rows -= dropped

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.random, dtype=torch.int32)

    @staticmethod
    def starts(counts: torch.Tensor) -> torch.Tensor:
        """First rows, and the end of the last ones."""
        ends = counts.cumsum(-1).int()
        return torch.cat((torch.zeros_like(ends[..., :1]), ends), -1)


def compare_lengths(
    num_requests: int, prunes: bool, page: int, device: str, seed: int
) -> Compared:
    """Lengths and slots; what belongs to no tier stays."""
    batch = _Batch(num_requests, prunes, seed)
    tables = [
        torch.randperm(200, generator=batch.random).int().view(8, -1).to(device)
        for _ in _TIER_OF_GROUP
    ]
    lens = torch.full((3, _MAX_REQUESTS), -5, dtype=torch.int32)
    slots = torch.full((len(_TIER_OF_GROUP), _MAX_TOKENS), -9)
    found = lens.to(device), slots.to(device)
    tier_lengths(
        batch.held.to(device),
        batch.starts(batch.scheduled).to(device),
        batch.evicted.to(device),
        torch.tensor(_TIER_OF_GROUP, dtype=torch.int32, device=device),
        torch.tensor([t.data_ptr() for t in tables]).to(torch.uint64).to(device),
        torch.tensor([t.stride(0) for t in tables], device=device),
        *found,
        block_size=page,
        num_rows=batch.rows.to(device) if prunes else None,
        row_starts=batch.starts(batch.rows).to(device) if prunes else None,
    )
    for group, tier in enumerate(_TIER_OF_GROUP):
        if tier >= 0:
            _fill(batch, tier, tables[group].cpu(), page, lens, slots[group])
    parts = zip(found, (lens, slots), strict=True)
    return all_of([exactly(a.cpu(), b) for a, b in parts])


def _fill(
    batch: _Batch, tier: int, table: torch.Tensor, page: int, lens: torch.Tensor,
    slots: torch.Tensor,
) -> None:  # fmt: skip
    """What is expected of one group."""
    rows = batch.rows[tier]
    held = batch.held - batch.evicted[tier] - (batch.scheduled - rows)
    lens[tier] = 0
    lens[tier, : len(rows)] = held
    place = 0
    for request, (count, end) in enumerate(
        zip(rows.tolist(), held.tolist(), strict=True)
    ):
        for position in range(end - count, end):
            block = int(table[request, position // page])
            slots[place] = block * page + position % page
            place += 1
    if batch.prunes:
        slots[place:] = -1


def compare_indices(device: str, seed: int) -> Compared:
    """Of pruned requests the rows that were selected, of others the first ones."""
    counts, kept_counts = [5, 300, 1, 40], [5, 280, 0, 7]
    starts = _Batch.starts(torch.tensor(counts))
    next_starts = _Batch.starts(torch.tensor(kept_counts))
    random = torch.Generator().manual_seed(seed)
    chosen = {
        i: torch.randperm(counts[i], generator=random)[: kept_counts[i]].sort().values
        for i in (1, 3)
    }
    kept = torch.full((350,), -1, dtype=torch.int32)
    kept[2:282], kept[300:307] = chosen[1].int(), chosen[3].int()
    out = torch.full((295,), -1, dtype=torch.int32, device=device)
    row_indices(
        starts.to(device),
        next_starts.to(device),
        torch.tensor([-1, 1, -1, 0], dtype=torch.int32, device=device),
        kept.to(device),
        torch.tensor([300, 2], dtype=torch.int32, device=device),
        out,
    )
    expected = torch.full((295,), -1, dtype=torch.int32)
    expected[:292] = torch.cat(
        [
            starts[i] + chosen.get(i, torch.arange(count))[:count]
            for i, count in enumerate(kept_counts)
        ]
    )
    return exactly(out.cpu(), expected)


def compare_moved_rows(
    dtype: torch.dtype, width: int, scatters: bool, device: str, seed: int
) -> Compared:
    """``source[index]``, and back among zeros."""
    random = torch.Generator(device).manual_seed(seed)
    source = torch.randn(20, width + 3, generator=random, device=device) * 100
    source = source.to(dtype)[:, :width]
    index = torch.tensor([0, 3, 4, 11, 19], dtype=torch.int32, device=device)
    rows = source[index.long()]
    if not scatters:
        return exactly(gather_rows(source, index), rows)
    whole = torch.zeros(20, width, dtype=dtype, device=device)
    whole[index.long()] = rows
    return exactly(scatter_rows(rows, index, 20), whole)


def compare_stored_queries(dtype: torch.dtype, device: str, seed: int) -> Compared:
    """Queries and their positions; other places stay."""
    random = torch.Generator(device).manual_seed(seed)
    query = torch.randn(6, 125, generator=random, device=device)
    query = query.to(dtype)[:, :120].unflatten(1, (3, 40))
    target = torch.tensor([4, -1, 0, 7, -1, 2, 99], dtype=torch.int32)
    positions = torch.tensor([40, 1, 10, 70, 1, 20, 5], dtype=torch.int32)
    is_narrow = dtype.itemsize == 1
    out_dtype, factor = (torch.bfloat16, 0.5) if is_narrow else (dtype, 1.0)
    out = torch.full((9, 3, 40), -7.0, dtype=out_dtype, device=device)
    tags = torch.full((9,), -1, dtype=torch.int32, device=device)
    expected, expected_tags = out.clone(), tags.clone()
    scale = torch.tensor([factor], device=device)
    store_queries(query, target.to(device), positions.to(device), scale, out, tags)
    for row in (0, 2, 3, 5):
        place = int(target[row])
        expected[place] = (query[row].float() * factor).to(out_dtype)
        expected_tags[place] = positions[row]
    return all_of([exactly(out, expected), exactly(tags, expected_tags)])


def compare_missing(device: str, seed: int) -> Compared:
    """A query is there if its place bears its position, in every layer."""
    ring = 6
    requests = [
        Request(50, queries=4, ring_start=5),
        Request(50, queries=6, ring_start=2),
        Request(50),
    ]
    first = torch.tensor([41, 100, 7], dtype=torch.int32)
    tags = torch.full((2, 3 * ring), -1, dtype=torch.int32)
    for i, request in enumerate(requests):
        for place in range(request.queries):
            at = i * ring + (request.ring_start + place) % ring
            tags[:, at] = int(first[i]) + place
    spans = Pages(Shape(head_size=16), requests, device, seed).spans(
        [0, ring, 2 * ring]
    )
    counts = []
    for _ in range(2):
        missing = torch.tensor([3], dtype=torch.int32, device=device)
        count_missing(tags.to(device), spans, first.to(device), missing, ring)
        counts.append(missing)
        tags[1, 0] += 1
        tags[0, ring + 3] -= 6
    expected = torch.tensor([3, 5], dtype=torch.int32, device=device)
    return exactly(torch.cat(counts), expected)


def cases(device: str, seed: int) -> Iterator[Case]:
    """Every kernel of this file."""
    for prunes, count, page in product((False, True), (1, 2, 5, 6), (16, 32)):

        def lengths(
            count: int = count, prunes: bool = prunes, page: int = page
        ) -> Compared:
            return compare_lengths(count, prunes, page, device, seed)

        variant = f"{count} requests, block {page}{', pruned' * prunes}"
        yield Case("tier_lengths", variant, lengths)
    yield Case("row_indices", "4 requests", lambda: compare_indices(device, seed))
    for scatters, dtype, width in product(
        (False, True), (torch.float32, torch.bfloat16, torch.int64), (1, 64, 1500)
    ):

        def rows(
            dtype: torch.dtype = dtype, width: int = width, scatters: bool = scatters
        ) -> Compared:
            return compare_moved_rows(dtype, width, scatters, device, seed)

        kernel = "scatter_rows" if scatters else "gather_rows"
        yield Case(kernel, f"{dtype}, width {width}", rows)
    for dtype in (torch.float32, torch.bfloat16, FP8[0]):
        yield Case(
            "store_queries",
            str(dtype),
            lambda dtype=dtype: compare_stored_queries(dtype, device, seed),
        )
    yield Case("count_missing", "3 rings", lambda: compare_missing(device, seed))
