"""Paged caches, requests and queries for the Triton kernels, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyramid_vllm.kernels.requests_triton import PagedLayers, Spans

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDE = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("HND", "NHD", "separate", "separate_NHD")
#: Tokens of the requests of one launch: interpreted kernels take these in seconds.
SHORT = [1, 2, 15, 16, 17, 31, 32, 33, 100]
LENGTHS = [0, *SHORT, 1000, 4097, 8192]
#: What lies where no kernel may write.
UNTOUCHED = -7.0
#: The first request's scores begin at ``_FIRST``, with ``_GAP`` unused places between
#: the scores of two requests.
_GAP, _FIRST = 5, 3


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
    """The form of the pages of some layers."""

    num_heads: int = 2
    head_size: int = 32
    block_size: int = 16
    layout: str = "HND"
    dtype: torch.dtype = torch.float32
    num_layers: int = 2

    @property
    def label(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} {self.layout} block {self.block_size} head {self.head_size}"


class Cache:
    """Random pages of some layers, and a block table that is out of order.

    Args:
        shape: of the pages.
        requests: the requests whose tokens lie in them.
        seed: of everything random.
        device: where the pages lie.
    """

    def __init__(
        self, shape: Shape, requests: list[Request], seed: int = 0, device: str = "cpu"
    ) -> None:
        self.shape, self.requests, self.device = shape, requests, device
        self.random = torch.Generator(device).manual_seed(seed)
        counts = [-(-request.num_held // shape.block_size) for request in requests]
        num_blocks = sum(counts) + 3
        layers = [self._pages(num_blocks) for _ in range(shape.num_layers)]
        self.keys, self.values = map(list, zip(*layers, strict=True))
        # Rows in another order than the requests; after their blocks lies garbage.
        on_host = torch.Generator().manual_seed(seed)
        self.rows = torch.randperm(len(requests), generator=on_host).tolist()
        blocks = torch.randperm(num_blocks, generator=on_host).int()
        width = max(counts, default=0) + 2
        table = torch.full((len(requests), width), 1 << 30, dtype=torch.int32)
        parts = blocks[: sum(counts)].split(counts)
        for row, count, part in zip(self.rows, counts, parts, strict=True):
            table[row, :count] = part
        self.table = table.to(device)

    def _pages(self, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values: ``[num_blocks, heads, block_size, head_size]``."""
        shape, size = self.shape, self.shape.head_size
        is_separate = shape.layout.startswith("separate")
        parts, width = (2, size) if is_separate else (1, 2 * size)
        inner = (shape.num_heads, shape.block_size)
        is_nhd = shape.layout.endswith("NHD")
        dims = (parts, num_blocks, *(inner[::-1] if is_nhd else inner), width)
        both = torch.empty(dims, dtype=shape.dtype, device=self.device)
        for part in both.flatten(0, 1).split(4096):
            part.copy_(self.randn(*part.shape))
        both = both.transpose(2, 3) if is_nhd else both
        if is_separate:
            return both[0], both[1]
        return both[0, ..., :size], both[0, ..., size:]

    def randn(self, *size: int) -> torch.Tensor:
        """Random float32 values on the cache's device."""
        return torch.randn(size, generator=self.random, device=self.device)

    def randint(self, low: int, high: int, *size: int) -> torch.Tensor:
        """Random int64 values on the cache's device."""
        return torch.randint(low, high, size, generator=self.random, device=self.device)

    def randomize(self) -> None:
        """Fill the pages with any bits at all, such as those of NaN."""
        for part in map(in_bytes, (*self.keys, *self.values)):
            part.copy_(self.randint(0, 256, *part.shape))

    def paged(self, of: str = "keys") -> PagedLayers:
        """All layers' keys or values, for kernels."""
        return PagedLayers.of(getattr(self, of))

    def block_ids(self, i: int) -> torch.Tensor:
        """The pages of a request, in order."""
        count = -(-self.requests[i].num_held // self.shape.block_size)
        return self.table[self.rows[i], :count]

    def tokens(self, layer: int, i: int, of: str = "keys") -> torch.Tensor:
        """``[num_held, num_kv_heads, head_size]`` of a request, in its dtype."""
        pages = getattr(self, of)[layer]
        taken = in_bytes(pages)[self.block_ids(i).long()]
        taken = taken.transpose(1, 2).flatten(0, 1)[: self.requests[i].num_held]
        return taken.contiguous().view(pages.dtype)

    @property
    def offsets(self) -> list[int]:
        """Place of each request's first score."""
        places, place = [], _FIRST
        for request in self.requests:
            places.append(place)
            place += request.num_held + _GAP
        return places

    @property
    def num_scores(self) -> int:
        """Places that ``spans`` needs."""
        return _FIRST + sum(request.num_held + _GAP for request in self.requests)

    def spans(self, query_starts: list[int] | None = None) -> Spans:
        """The requests, on the device."""
        starts = query_starts or [0] * len(self.requests)
        columns = [
            (row, start, r.ring_start, r.num_queries, r.num_held, r.num_kept,
             r.num_first, r.num_recent, r.column, r.columns, offset)
            for r, row, start, offset in zip(
                self.requests, self.rows, starts, self.offsets, strict=True
            )
        ]  # fmt: skip
        table = torch.tensor(columns, dtype=torch.int32).view(-1, len(Spans._fields))
        return Spans.of(table.T.contiguous().to(self.device))


def in_bytes(values: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8; the last dimension is contiguous."""
    return values.view(torch.uint8)


def queries_of(
    cache: Cache, group: int, dtype: torch.dtype, ring: int | None = None
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
    size = (shape.num_layers, num_rows, shape.num_heads * group, shape.head_size)
    query = cache.randn(*size).to(dtype)
    places = []
    for start, request in zip(starts, cache.requests, strict=True):
        place = torch.arange(request.num_queries, device=cache.device)
        if ring:
            place = (place + request.ring_start) % ring
        places.append(start + place)
    return query, starts, [[of_layer.float()[p] for p in places] for of_layer in query]


def ones(
    num_layers: int, factor: float = 1.0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Addresses of each layer's factor of its quantized keys, and the factors."""
    factors = factor + torch.arange(num_layers, device=device)
    addresses = [factors[i : i + 1].data_ptr() for i in range(num_layers)]
    return torch.tensor(addresses, device=device), factors
