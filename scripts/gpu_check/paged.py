"""Random pages, requests and queries on a device, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_check.loading import load_kernels

load_kernels()

from pyramid_vllm.kernels.requests_triton import PagedLayers, Spans  # noqa: E402

#: Scores of a request begin some places behind those of the last one.
_GAP, _FIRST = 5, 3


@dataclass(frozen=True)
class Request:
    """One request of a launch; see ``Spans``."""

    held: int
    kept: int = 0
    first: int = 0
    recent: int = 0
    queries: int = 0
    ring_start: int = 0
    column: int = 0
    columns: int | None = None
    """None: those from ``column`` on."""

    @property
    def num_columns(self) -> int:
        return self.held - self.column if self.columns is None else self.columns


@dataclass(frozen=True)
class Shape:
    """What the pages of some layers are like."""

    heads: int = 2
    head_size: int = 64
    page: int = 16
    layout: str = "NHD"
    dtype: torch.dtype = torch.float32
    layers: int = 2

    @property
    def label(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} {self.layout} block {self.page} head {self.head_size}"


class Pages:
    """Keys beside values in one page, as vLLM's backends on a GPU have them.

    Args:
        shape: of the pages.
        requests: what lies in them.
        device: where.
        seed: of everything random.
    """

    def __init__(
        self, shape: Shape, requests: list[Request], device: str, seed: int = 0
    ) -> None:
        self.shape, self.requests, self.device = shape, requests, device
        self.random = torch.Generator(device).manual_seed(seed)
        counts = [-(-request.held // shape.page) for request in requests]
        self.num_blocks = sum(counts) + 3
        self.caches = [self._cache() for _ in range(shape.layers)]
        size = shape.head_size
        self.keys = [cache[..., :size] for cache in self.caches]
        self.values = [cache[..., size:] for cache in self.caches]
        on_host = torch.Generator().manual_seed(seed)
        # Rows in another order than the requests; behind their blocks lies garbage.
        self.rows = torch.randperm(len(requests), generator=on_host).tolist()
        blocks = torch.randperm(self.num_blocks, generator=on_host).int()
        width = max(counts, default=0) + 2
        table = torch.full((len(requests), width), 1 << 30, dtype=torch.int32)
        parts = blocks[: sum(counts)].split(counts)
        for row, count, part in zip(self.rows, counts, parts, strict=True):
            table[row, :count] = part
        self.table = table.to(device)

    def _cache(self) -> torch.Tensor:
        """``[num_blocks, heads, page, 2 * head_size]``"""
        shape = self.shape
        inner = (shape.page, shape.heads)
        if shape.layout == "HND":
            inner = inner[::-1]
        size = (self.num_blocks, *inner, 2 * shape.head_size)
        cache = torch.empty(size, dtype=shape.dtype, device=self.device)
        for part in cache.split(4096):
            part.copy_(
                torch.randn(part.shape, generator=self.random, device=self.device)
            )
        return cache if shape.layout == "HND" else cache.transpose(1, 2)

    def paged(self, of: str = "keys", layers: slice = slice(None)) -> PagedLayers:
        """Some layers' keys or values, for kernels."""
        return PagedLayers.of(getattr(self, of)[layers])

    def block_ids(self, i: int) -> torch.Tensor:
        """The pages of a request, in order."""
        count = -(-self.requests[i].held // self.shape.page)
        return self.table[self.rows[i], :count]

    def tokens(self, layer: int, i: int, of: str = "keys") -> torch.Tensor:
        """``[held, heads, head_size]`` of a request, in the pages' dtype."""
        pages, ids = getattr(self, of)[layer], self.block_ids(i).long()
        is_narrow = pages.dtype.itemsize == 1
        taken = (pages.view(torch.uint8) if is_narrow else pages)[ids]
        taken = taken.transpose(1, 2).flatten(0, 1)[: self.requests[i].held]
        return taken.contiguous().view(pages.dtype)

    def randomize(self) -> None:
        """Any bits at all, such as those of values that are no numbers."""
        for cache in self.caches:
            flat = cache if self.shape.layout == "HND" else cache.transpose(1, 2)
            flat = flat.view(torch.uint8)
            flat.copy_(
                torch.randint(
                    0, 256, flat.shape, generator=self.random, device=self.device,
                    dtype=torch.uint8,
                )
            )  # fmt: skip

    @property
    def offsets(self) -> list[int]:
        """Place of each request's first score."""
        places, place = [], _FIRST
        for request in self.requests:
            places.append(place)
            place += request.held + _GAP
        return places

    @property
    def num_scores(self) -> int:
        """Places of all scores."""
        return _FIRST + sum(request.held + _GAP for request in self.requests)

    def spans(self, query_starts: list[int] | None = None) -> Spans:
        """The requests, on the device."""
        starts = query_starts or [0] * len(self.requests)
        columns = [
            (row, start, r.ring_start, r.queries, r.held, r.kept, r.first, r.recent,
             r.column, r.num_columns, offset)
            for r, row, start, offset in zip(
                self.requests, self.rows, starts, self.offsets, strict=True
            )
        ]  # fmt: skip
        table = torch.tensor(columns, dtype=torch.int32).view(-1, len(Spans._fields))
        return Spans.of(table.T.contiguous().to(self.device))

    def queries(
        self, group: int, dtype: torch.dtype, ring: int | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Random queries and each request's first row.

        Returns:
            ``[layers, num_rows, heads * group, head_size]``, and the rows.
        """
        starts, num_rows = [], 2
        for request in self.requests:
            starts.append(num_rows)
            num_rows += ring or request.queries
        shape = self.shape
        size = (shape.layers, num_rows, shape.heads * group, shape.head_size)
        query = torch.randn(size, generator=self.random, device=self.device)
        return query.to(dtype), starts
