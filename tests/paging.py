"""Paged caches, requests and queries for the Triton kernels, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyramid_vllm.kernels.requests_triton import PagedLayers, Spans

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LAYOUTS = ("HND", "NHD", "separate", "separate_NHD")


@dataclass(frozen=True)
class Request:
    """One request of a launch; see ``Spans``."""

    num_held: int
    num_kept: int = 0
    num_first: int = 0
    num_recent: int = 0
    num_queries: int = 0
    ring_start: int = 0
    column: int = 0
    num_columns: int | None = None
    """None: those from ``column`` on."""

    @property
    def columns(self) -> int:
        left = self.num_held - self.column
        return left if self.num_columns is None else self.num_columns


@dataclass(frozen=True)
class Shape:
    """What the pages of some layers are like."""

    num_heads: int = 2
    head_size: int = 32
    block_size: int = 16
    layout: str = "HND"
    dtype: torch.dtype = torch.float32
    num_layers: int = 2


class Cache:
    """Random pages of some layers, and a block table that is out of order."""

    def __init__(self, shape: Shape, requests: list[Request], seed: int = 0) -> None:
        self.shape, self.requests = shape, requests
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-request.num_held // shape.block_size) for request in requests]
        num_blocks = sum(counts) + 3
        self.keys, self.values = [], []
        for _ in range(shape.num_layers):
            key, value = _pages(shape, num_blocks)
            for part in (key, value):
                part.copy_(torch.randn(part.shape, generator=generator))
            self.keys.append(key)
            self.values.append(value)
        # Rows in another order than the requests; behind their blocks lies garbage.
        self.rows = torch.randperm(len(requests), generator=generator).tolist()
        blocks = torch.randperm(num_blocks, generator=generator).int()
        self.table = torch.full((len(requests), max(counts, default=0) + 2), 1 << 30)
        self.table = self.table.int()
        for row, count, part in zip(
            self.rows, counts, blocks[: sum(counts)].split(counts), strict=True
        ):
            self.table[row, :count] = part

    def paged(self, of: str = "keys") -> PagedLayers:
        return PagedLayers.of(getattr(self, of))

    def block_ids(self, i: int) -> torch.Tensor:
        """The pages of a request, in order."""
        count = -(-self.requests[i].num_held // self.shape.block_size)
        return self.table[self.rows[i], :count]

    def tokens(self, layer: int, i: int, of: str = "keys") -> torch.Tensor:
        """``[num_held, num_kv_heads, head_size]`` of a request, in its dtype."""
        pages = getattr(self, of)[layer]
        if pages.dtype in FP8:
            taken = pages.view(torch.uint8)[self.block_ids(i).long()]
            taken = taken.view(pages.dtype)
        else:
            taken = pages[self.block_ids(i).long()]
        return taken.transpose(1, 2).flatten(0, 1)[: self.requests[i].num_held]

    def spans(self, query_starts: list[int] | None = None) -> Spans:
        """The requests; scores of each begin some places behind the last one's."""
        columns = [[0] * len(self.requests) for _ in Spans._fields]
        offset = 3
        for i, request in enumerate(self.requests):
            values = {
                "row": self.rows[i],
                "query_start": query_starts[i] if query_starts else 0,
                "num_columns": request.columns,
                "offset": offset,
            }
            offset += request.num_held + 5
            for field, column in zip(Spans._fields, columns, strict=True):
                column[i] = values.get(field, getattr(request, field, 0))
        return Spans.of(torch.tensor(columns, dtype=torch.int32))

    @property
    def num_scores(self) -> int:
        """Places that ``spans`` needs."""
        return sum(request.num_held + 5 for request in self.requests) + 3


def _pages(shape: Shape, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    heads, size = shape.num_heads, shape.head_size
    if shape.layout.startswith("separate"):
        width, parts = size, 2
    else:
        width, parts = 2 * size, 1
    if shape.layout.endswith("NHD"):
        both = torch.zeros(
            parts, num_blocks, shape.block_size, heads, width, dtype=shape.dtype
        ).transpose(2, 3)
    else:
        both = torch.zeros(
            parts, num_blocks, heads, shape.block_size, width, dtype=shape.dtype
        )
    if parts == 2:
        return both[0], both[1]
    return both[0, ..., :size], both[0, ..., size:]


def queries_of(
    cache: Cache,
    group: int,
    dtype: torch.dtype,
    ring: int | None = None,
    seed: int = 1,
) -> tuple[torch.Tensor, list[int], list[list[torch.Tensor]]]:
    """Random queries of each layer, as the kernel takes them and as it should.

    Returns:
        ``[num_layers, num_rows, num_heads, head_size]``, each request's first row, and
        by layer and request ``[num_queries, num_heads, head_size]``.
    """
    shape, starts = cache.shape, []
    num_rows = 2
    for request in cache.requests:
        starts.append(num_rows)
        num_rows += ring or request.num_queries
    generator = torch.Generator().manual_seed(seed)
    size = (shape.num_layers, num_rows, shape.num_heads * group, shape.head_size)
    query = torch.randn(size, generator=generator).to(dtype)
    by_layer = []
    for layer in range(shape.num_layers):
        of_layer = []
        for start, request in zip(starts, cache.requests, strict=True):
            place = torch.arange(request.num_queries)
            if ring:
                place = (place + request.ring_start) % ring
            of_layer.append(query[layer].float()[start + place])
        by_layer.append(of_layer)
    return query, starts, by_layer


def ones(num_layers: int, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Addresses of each layer's factor of its quantized keys, and the factors."""
    factors = torch.full((num_layers,), factor) + torch.arange(num_layers)
    addresses = [factors[i].data_ptr() for i in range(num_layers)]
    return torch.tensor(addresses), factors
