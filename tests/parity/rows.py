"""Cases of the kernels of lengths, slots, rows and kept queries, in plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from pyramid_vllm.kernels.lengths_triton import tier_lengths
from pyramid_vllm.kernels.prune_triton import gather_rows, row_indices, scatter_rows
from pyramid_vllm.kernels.queries_triton import count_missing, store_queries
from tests.parity.compared import Case, Compared, all_of, exactly
from tests.parity.paging import FP8, UNTOUCHED, Cache, Request, Shape

_TIER_OF_GROUP = (2, 0, -1, 2)
_MAX_REQUESTS, _MAX_TOKENS = 6, 400


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """First rows, and the end of the last ones."""
    ends = counts.cumsum(-1).int()
    return torch.cat((torch.zeros_like(ends[..., :1]), ends), -1)


class _Batch:
    """A batch's lengths, and what ``BatchRows`` would make of them."""

    def __init__(
        self, num_requests: int, prunes: bool, block_size: int, seed: int
    ) -> None:
        random = torch.Generator().manual_seed(seed + num_requests)

        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=random).int()

        self.block_size, self.prunes = block_size, prunes
        self.scheduled = integers(0, 40, num_requests)
        if num_requests > 1:
            self.scheduled[1] = 300 if num_requests < 4 else 1
        assert self.scheduled.sum() < _MAX_TOKENS
        self.seq_lens = self.scheduled + integers(20, 60, num_requests)
        self.evicted = integers(0, 20, 3, num_requests)
        self.num_rows = self.scheduled.expand(3, -1).clone()
        if prunes:
            # Of other tiers other rows; of the first all.
            dropped = integers(0, 10, 3, num_requests).minimum(self.num_rows)
            dropped[0] = 0
            self.num_rows -= dropped
        blocks = -(-400 // block_size) * 8
        self.tables = [
            torch.randperm(blocks, generator=random).int().view(8, -1)
            for _ in _TIER_OF_GROUP
        ]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths by tier, and slots by KV cache group."""
        lens = torch.full((3, _MAX_REQUESTS), -5, dtype=torch.int32)
        slots = torch.full((len(_TIER_OF_GROUP), _MAX_TOKENS), -9)
        for group, tier in enumerate(_TIER_OF_GROUP):
            if tier < 0:
                continue
            rows, place = self.num_rows[tier], 0
            held = self.seq_lens - self.evicted[tier] - (self.scheduled - rows)
            lens[tier] = 0
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
        """Run the kernel on the device of the outputs."""
        device, prunes = lens.device, self.prunes
        tables = [table.to(device) for table in self.tables]
        tier_lengths(
            self.seq_lens.to(device),
            _starts(self.scheduled).to(device),
            self.evicted.to(device),
            torch.tensor(_TIER_OF_GROUP, dtype=torch.int32, device=device),
            torch.tensor([t.data_ptr() for t in tables]).to(torch.uint64).to(device),
            torch.tensor([t.stride(0) for t in tables], device=device),
            lens,
            slots,
            block_size=self.block_size,
            num_rows=self.num_rows.to(device) if prunes else None,
            row_starts=_starts(self.num_rows).to(device) if prunes else None,
        )


def compare_lengths(
    num_requests: int, prunes: bool, block_size: int, device: str, seed: int
) -> Compared:
    """Tiers without a KV cache group, groups without a tier and slots without a row
    stay. A second run changes nothing."""
    batch, parts = _Batch(num_requests, prunes, block_size, seed), []
    expected = batch.expected()
    lens = torch.full_like(expected[0], -5).to(device)
    slots = torch.full_like(expected[1], -9).to(device)
    for _ in range(2):
        batch.write(lens, slots)
        parts += [exactly(lens.cpu(), expected[0]), exactly(slots.cpu(), expected[1])]
    return all_of(parts)


def compare_indices(device: str, seed: int) -> Compared:
    """Of pruned requests the rows that were selected, of others the first ones."""
    counts, kept_counts = [5, 300, 1, 40], [5, 280, 0, 7]
    starts, next_starts = (_starts(torch.tensor(n)) for n in (counts, kept_counts))
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
    scatters: bool, dtype: torch.dtype, width: int, device: str, seed: int
) -> Compared:
    """``source[index]``, also of no index, and back among zeros."""
    random = torch.Generator(device).manual_seed(seed)
    source = torch.randn(20, width + 3, generator=random, device=device) * 100
    source = source.to(dtype)[:, :width]
    index = torch.tensor([0, 3, 4, 11, 19], dtype=torch.int32, device=device)
    rows = source[index.long()]
    if not scatters:
        parts = [(gather_rows(source, part), len(part)) for part in (index, index[:0])]
        return all_of([exactly(found, rows[:count]) for found, count in parts])
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
    out_dtype, factor = (torch.bfloat16, 0.5) if dtype in FP8 else (dtype, 1.0)
    out = torch.full((9, 3, 40), UNTOUCHED, dtype=out_dtype, device=device)
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
        Request(50, num_queries=4, ring_start=5),
        Request(50, num_queries=6, ring_start=2),
        Request(50),
    ]
    first = torch.tensor([41, 100, 7], dtype=torch.int32)
    tags = torch.full((2, 3 * ring), -1, dtype=torch.int32)
    for i, request in enumerate(requests):
        for place in range(request.num_queries):
            at = i * ring + (request.ring_start + place) % ring
            tags[:, at] = int(first[i]) + place
    spans = Cache(Shape(), requests, seed, device).spans([0, ring, 2 * ring])
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
    """Every kernel of this file on a device."""

    def case(kernel: str, variant: str, run: Any, *arguments: Any) -> Case:
        return Case(kernel, variant, lambda: run(*arguments, device, seed))

    for prunes, count, block in product((False, True), (1, 2, 5, 6), (16, 32)):
        variant = f"{count} requests, block {block}{', pruned' * prunes}"
        yield case("tier_lengths", variant, compare_lengths, count, prunes, block)
    yield case("row_indices", "4 requests", compare_indices)
    for scatters, dtype, width in product(
        (False, True),
        (torch.float32, torch.bfloat16, torch.int64),
        (1, 7, 64, 1500),
    ):
        kernel = "scatter_rows" if scatters else "gather_rows"
        variant = f"{dtype}, width {width}"
        yield case(kernel, variant, compare_moved_rows, scatters, dtype, width)
    for dtype in (torch.float32, torch.bfloat16, FP8[0]):
        yield case("store_queries", str(dtype), compare_stored_queries, dtype)
    yield case("count_missing", "3 rings", compare_missing)
