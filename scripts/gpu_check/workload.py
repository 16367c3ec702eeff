"""The policy's work in a prefill step, with buffers that stay, to be timed.

Imported after ``load_package``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from pyramid_vllm.kernels.compact_triton import compact_pages
from pyramid_vllm.kernels.requests_triton import PagedLayers
from pyramid_vllm.kernels.score_triton import pool_scores, score
from pyramid_vllm.kernels.scratch import Scratch
from pyramid_vllm.kernels.select_triton import select
from tests.parity.paging import Cache, Request, Shape


@dataclass(frozen=True)
class Sizes:
    """A model and its requests: Llama-3-8B and the default policy."""

    num_requests: int = 1
    num_tokens: int = 8192
    num_queries: int = 256
    num_layers: int = 32
    num_tiers: int = 4
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    page: int = 16
    layout: str = "NHD"
    dtype: torch.dtype = torch.bfloat16
    retention: float = 0.4
    sinks: int = 4
    recent: int = 64
    pool_kernel: int = 5
    hidden: int = 4096
    intermediate: int = 14336

    @property
    def num_kept(self) -> int:
        """Tokens that stay of a request."""
        return int(self.num_tokens * self.retention)

    @property
    def token_bytes(self) -> int:
        """Keys of one token in one layer."""
        return self.num_kv_heads * self.head_size * self.dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all."""
        return 2 * self.key_bytes(self.num_layers)

    def key_bytes(self, layers: int) -> int:
        """All keys of some layers, once."""
        return layers * self.num_requests * self.num_tokens * self.token_bytes

    def moved_bytes(self, layers: int) -> int:
        """Keys and values that compaction reads, and as many that it writes."""
        moved = self.num_kept - self.sinks
        return 4 * layers * self.num_requests * moved * self.token_bytes

    def score_flop(self, layers: int) -> int:
        """Of both products of queries and keys: normalizers, then scores."""
        pairs = self.num_requests * self.num_queries * self.num_tokens
        return 2 * 2 * layers * pairs * self.num_heads * self.head_size


class Step:
    """Pages, queries and buffers; each method launches what a step does.

    Args:
        sizes: of everything.
        device: where.
        seed: of everything random.
    """

    def __init__(self, sizes: Sizes, device: str, seed: int) -> None:
        self.sizes = sizes
        shape = Shape(
            sizes.num_kv_heads,
            sizes.head_size,
            sizes.page,
            sizes.layout,
            sizes.dtype,
            sizes.num_layers,
        )
        request = Request(
            sizes.num_tokens,
            sizes.num_kept,
            sizes.sinks,
            sizes.recent,
            sizes.num_queries,
        )
        self.pages = Cache(shape, [request] * sizes.num_requests, seed, device)
        self._set_queries()
        self.keys, self.values = self.pages.paged(), self.pages.paged("values")
        size = (sizes.num_layers, sizes.num_kv_heads, self.pages.num_scores)
        self.scores = self.pages.randn(*size)
        self.pooled = torch.zeros_like(self.scores)
        self.kept = torch.zeros(size, dtype=torch.int32, device=device)
        self._factor = torch.ones(1, device=device)
        address = self._factor.data_ptr()
        self._scales = torch.full((sizes.num_layers,), address, device=device)
        self._scratch = Scratch(torch.device(device))
        self._first = torch.zeros(1, dtype=torch.int64, device=device)

    def _set_queries(self) -> None:
        """Draw the step's queries, which lie in one tensor, as a layer's do."""
        sizes = self.sizes
        rows = sizes.num_requests * sizes.num_queries
        query = self.pages.randn(1, rows, sizes.num_heads, sizes.head_size)
        self.query = query.to(sizes.dtype)
        starts = [i * sizes.num_queries for i in range(sizes.num_requests)]
        self.spans = self.pages.spans(starts)

    def with_queries(self, count: int) -> Step:
        """The same pages and buffers, scored by other queries."""
        step, pages = copy.copy(self), copy.copy(self.pages)
        pages.requests = [replace(one, num_queries=count) for one in pages.requests]
        step.sizes, step.pages = replace(self.sizes, num_queries=count), pages
        step._set_queries()
        return step

    @staticmethod
    def _of(pages: PagedLayers, layers: slice) -> PagedLayers:
        return pages._replace(addresses=pages.addresses[layers])

    def score(self, layer: int) -> None:
        """Score one layer, as after its attention."""
        sizes, own = self.sizes, slice(layer, layer + 1)
        score(
            self.query,
            self._first,
            self._of(self.keys, own),
            self.pages.table,
            self.spans,
            self.scores[own],
            max_queries=sizes.num_queries,
            max_tokens=sizes.num_tokens,
            max_columns=sizes.num_tokens,
            scale=sizes.head_size**-0.5,
            query_scale=self._factor,
            key_scales=self._scales[own],
            scratch=self._scratch,
        )

    def score_layers(self) -> None:
        """Score every layer, one after the other."""
        for layer in range(self.sizes.num_layers):
            self.score(layer)

    def pool(self, layers: slice) -> None:
        """Pool the scores of some layers together."""
        scores, pooled, spans = self.scores[layers], self.pooled[layers], self.spans
        kernel, longest = self.sizes.pool_kernel, self.sizes.num_tokens
        pool_scores(scores, pooled, spans, "max", kernel, max_columns=longest)

    def select(self, layers: slice) -> None:
        """Select the tokens of some layers together."""
        longest = self.sizes.num_tokens
        select(self.pooled[layers], self.kept[layers], self.spans, max_tokens=longest)

    def compact(self, layers: slice) -> None:
        """Compact some layers together. Later calls move tokens that were moved
        before."""
        keys, values = self._of(self.keys, layers), self._of(self.values, layers)
        table = self.pages.table
        compact_pages(keys, values, table, self.spans, self.kept[layers])

    def prefill(self) -> None:
        """Do all of a step. Tiers are selected and compacted after their last layer."""
        size = self.sizes.num_layers // self.sizes.num_tiers
        for layer in range(self.sizes.num_layers):
            self.score(layer)
            if (layer + 1) % size == 0:
                tier = slice(layer + 1 - size, layer + 1)
                self.pool(tier)
                self.select(tier)
                self.compact(tier)


class PrefillLayer:
    """A stand-in for one layer of the prefill, with random weights.

    Norms, rotary positions and the activation are left out, so that the policy's share
    is given too large rather than too small.

    Args:
        sizes: of the layer and of the prompt.
        device: where.
    """

    def __init__(self, sizes: Sizes, device: str) -> None:
        self._sizes = sizes
        heads = sizes.num_heads + 2 * sizes.num_kv_heads

        def weight(rows: int, columns: int) -> torch.Tensor:
            values = torch.randn(rows, columns, dtype=sizes.dtype, device=device)
            return values * rows**-0.5

        self._qkv = weight(sizes.hidden, heads * sizes.head_size)
        self._out = weight(sizes.num_heads * sizes.head_size, sizes.hidden)
        self._gate_up = weight(sizes.hidden, 2 * sizes.intermediate)
        self._down = weight(sizes.intermediate, sizes.hidden)
        self._x = weight(sizes.num_tokens, sizes.hidden)

    def run(self) -> torch.Tensor:
        """The prompt's rows after the layer."""
        sizes = self._sizes
        rows = self._x @ self._qkv
        heads = rows.view(1, len(rows), -1, sizes.head_size).transpose(1, 2)
        counts = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
        query, key, value = heads.split(counts, dim=1)
        attended = scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        x = attended.transpose(1, 2).reshape(len(rows), -1) @ self._out
        return (x @ self._gate_up)[:, : sizes.intermediate] @ self._down
