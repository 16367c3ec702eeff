"""Cases of the kernels that score."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from pyramid_vllm.kernels import (
    accumulated_scores,
    key_diff_scores,
    key_norm_scores,
    norms_triton,
    pooled,
    score_triton,
    vote_scores,
    window_scores,
)
from pyramid_vllm.kernels.scratch import Scratch
from tests.parity.compared import Case, Compared, within
from tests.parity.paging import (
    FP8,
    LAYOUTS,
    LENGTHS,
    SHORT,
    UNTOUCHED,
    WIDE,
    Cache,
    Request,
    Shape,
    ones,
    queries_of,
)

KINDS = ("attention", "accumulated", "votes")
#: Sums are rounded differently; GPUs multiply float32 in three parts of TF32.
_RELATIVE = {"cpu": 2e-4, "cuda": 5e-4}
_HALF, _E4M3 = torch.bfloat16, FP8[0]
#: Generated tokens that are compressed at once; their queries lie in rings of 8.
RINGS = [
    Request(40, num_queries=8, ring_start=3, column=11, num_columns=7),
    Request(23, num_queries=1, ring_start=7, column=5, num_columns=7),
    Request(64, num_queries=5, ring_start=0, column=40, num_columns=7),
]


@dataclass(frozen=True)
class Scoring:
    """How requests are scored."""

    shape: Shape
    group: int = 1
    kind: int = score_triton.ATTENTION
    query_dtype: torch.dtype | None = None
    """None: that of the keys."""
    ring: int | None = None
    soft_cap: float = 0.0
    has_sinks: bool = False
    factor: float = 1.0
    """Of the first layer's keys; of each further layer 1 more."""
    query_factor: float = 1.0
    distance_weight: float = 1.3
    magnitude: float = 1.0
    """Random keys are multiplied by it."""

    @property
    def label(self) -> str:
        parts = [KINDS[self.kind], self.shape.label, f"group {self.group}"]
        parts += [f"queries {self.query_dtype}"] if self.query_dtype else []
        parts += ["ring"] if self.ring else []
        parts += [f"cap {self.soft_cap:g}"] if self.soft_cap else []
        return ", ".join(parts + ["sinks"] * self.has_sinks)


def scored(num_held: int, num_queries: int) -> Request:
    """A request that is scored by its newest queries."""
    return Request(num_held, num_queries=min(num_held, num_queries))


@functools.cache
def _scratch(device: str) -> Scratch:
    """One for all launches: what others have left there must not matter."""
    return Scratch(torch.device(device))


def run_scores(
    cache: Cache, scoring: Scoring
) -> tuple[torch.Tensor, list[list[torch.Tensor]], torch.Tensor | None]:
    """Score all requests in one launch.

    Returns:
        ``[num_layers, num_heads, num_scores]``, the queries of each layer and request,
        and the logits of sinks, ``[num_layers, num_query_heads]``.
    """
    shape, requests, device = scoring.shape, cache.requests, cache.device
    query, starts, queries = queries_of(
        cache, scoring.group, scoring.query_dtype or shape.dtype, scoring.ring
    )
    addresses, _factors = ones(shape.num_layers, scoring.factor, device)
    sinks = None
    if scoring.has_sinks:
        sinks = cache.randn(shape.num_layers, shape.num_heads * scoring.group)
    size = (shape.num_layers, shape.num_heads, cache.num_scores)
    out = torch.full(size, UNTOUCHED, device=device)
    score_triton.score(
        # Layers need not lie in the order of their queries.
        query.flip(0),
        torch.arange(shape.num_layers, device=device).flip(0),
        cache.paged(),
        cache.table,
        cache.spans(starts),
        out,
        max_queries=max(request.num_queries for request in requests),
        max_tokens=max(request.num_held for request in requests),
        max_columns=max(request.columns for request in requests),
        scale=shape.head_size**-0.5,
        query_scale=torch.tensor([scoring.query_factor], device=device),
        key_scales=addresses,
        distance_weight=scoring.distance_weight,
        kind=scoring.kind,
        logits_soft_cap=scoring.soft_cap,
        sink_logits=sinks,
        ring=scoring.ring,
        scratch=_scratch(device),
    )
    return out, [[q * scoring.query_factor for q in row] for row in queries], sinks


def _reference(
    scoring: Scoring, query: torch.Tensor, key: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """``[num_heads, num_held]`` of one layer and request."""
    scale, more = scoring.shape.head_size**-0.5, (scoring.soft_cap, sinks)
    if scoring.kind == score_triton.ATTENTION:
        return window_scores(query, key, scale, scoring.distance_weight, *more)
    if scoring.kind == score_triton.ACCUMULATED:
        return accumulated_scores(query, key, scale, *more)
    return vote_scores(query, key, scale, *more)


def compare_scores(
    scoring: Scoring, requests: list[Request], device: str = "cpu", seed: int = 0
) -> Compared:
    """Scores beside their reference; other places stay."""
    cache = Cache(scoring.shape, requests, seed, device)
    for part in cache.keys if scoring.magnitude != 1 else ():
        part *= scoring.magnitude
    out, queries, sinks = run_scores(cache, scoring)
    expected = torch.full_like(out, UNTOUCHED)
    for layer, of_layer in enumerate(queries):
        for i, (request, begin) in enumerate(zip(requests, cache.offsets, strict=True)):
            if not request.num_queries:
                continue
            key = cache.tokens(layer, i).float() * (scoring.factor + layer)
            logits = None if sinks is None else sinks[layer]
            values = _reference(scoring, of_layer[i], key, logits)
            first, count = request.column, request.columns
            expected[layer, :, begin : begin + count] = values[:, first : first + count]
    if scoring.kind == score_triton.VOTES and device != "cpu":
        return _votes(out, expected, scoring.group)
    return within(out, expected, _RELATIVE[device], 2e-6)


def _votes(found: torch.Tensor, expected: torch.Tensor, group: int) -> Compared:
    """A share of attention that is all but the mean may be a vote or none."""
    errors = (found - expected).abs()
    share = (errors > 1e-3).float().mean().item()
    largest = errors.max().item()
    same = share <= 0.01 and largest <= 2.0 / group + 1e-3
    limit = "2 heads' votes in 1% of the places"
    return Compared(same, largest, share, found.numel(), limit)


def _compare_keys(
    cache: Cache,
    requests: list[Request],
    score: Callable[[torch.Tensor], None],
    reference: Callable[[torch.Tensor], torch.Tensor],
    tolerances: tuple[float, float],
) -> Compared:
    """Scores of every layer and request that follow from the scored keys alone."""
    shape = cache.shape
    size = (shape.num_layers, shape.num_heads, cache.num_scores)
    out = torch.full(size, UNTOUCHED, device=cache.device)
    expected = out.clone()
    score(out)
    for layer, i in product(range(shape.num_layers), range(len(requests))):
        own = cache.tokens(layer, i).float()[requests[i].column :]
        begin = cache.offsets[i]
        if len(own):
            expected[layer, :, begin : begin + len(own)] = reference(own)
    return within(out, expected, *tolerances)


def compare_key_norms(
    shape: Shape, requests: list[Request], device: str, seed: int
) -> Compared:
    """Norms of every layer and request."""
    cache = Cache(shape, requests, seed, device)
    longest = max(request.num_held for request in requests)
    score = functools.partial(
        norms_triton.score_key_norms,
        *(cache.paged(), cache.table, cache.spans()),
        max_tokens=longest,
    )
    return _compare_keys(cache, requests, score, key_norm_scores, (1e-5, 1e-6))


def compare_key_diffs(
    shape: Shape, requests: list[Request], device: str, seed: int
) -> Compared:
    """Likeness of every layer's and request's keys to their mean."""
    cache = Cache(shape, requests, seed, device)
    score = functools.partial(
        norms_triton.score_key_diffs, cache.paged(), cache.table, cache.spans()
    )
    return _compare_keys(cache, requests, score, key_diff_scores, (1e-4, 1e-5))


def compare_pooling(
    kind: str, kernel: int, requests: list[Request], device: str, seed: int
) -> Compared:
    """Pooled scores beside ``pooled``."""
    cache = Cache(Shape(), requests, seed, device)
    scores = cache.randn(2, 2, cache.num_scores)
    out = torch.full_like(scores, UNTOUCHED)
    expected = out.clone()
    longest = max(request.columns for request in requests)
    score_triton.pool_scores(
        scores, out, cache.spans(), kind, kernel, max_columns=longest
    )
    for request, begin in zip(requests, cache.offsets, strict=True):
        place = slice(begin, begin + request.columns)
        for layer in range(2):
            part = pooled(scores[layer, :, place], request.num_recent, kind, kernel)
            expected[layer, :, place] = part
    return within(out, expected, 1e-5, 1e-6)


def _scoring(shape: Shape, group: int, **options: Any) -> Scoring:
    """Eight-bit keys have factors, and queries of more bits."""
    if shape.dtype in FP8:
        options = {"query_dtype": _HALF, "factor": 0.7} | options
    return Scoring(shape, group, **options)


def _kinds(plain: Scoring) -> Iterator[Scoring]:
    for kind, cap, sinks in product(range(3), (0.0, 2.0), (False, True)):
        yield replace(plain, kind=kind, soft_cap=cap, has_sinks=sinks)


def _scorings() -> Iterator[tuple[Scoring, list[Request]]]:
    """For every device; requests may have no queries."""
    several = [scored(33, 5), Request(20), scored(17, 64), Request(0)]
    for layout, dtype in product(LAYOUTS, (*WIDE, *FP8)):
        shape = Shape(2, 32, 16, layout, dtype)
        yield _scoring(shape, 3, distance_weight=1.5), several
    eight_bits = {"query_dtype": _E4M3, "factor": 0.6, "query_factor": 1.7}
    yield Scoring(Shape(dtype=_E4M3), 2, **eight_bits), [scored(40, 6)]
    for size, group in product((32, 64, 80, 128), (1, 3, 4)):
        shape = Shape(2, size, 32, "NHD", _HALF, 1)
        yield Scoring(shape, group, distance_weight=2.0), [scored(70, 5), scored(31, 1)]
    for count in (1, 5, 64):
        yield Scoring(Shape(1), 2), [scored(held, count) for held in SHORT]
    for held in (1000, 4097, 8192):
        yield Scoring(Shape(1, num_layers=1)), [scored(held, 256), scored(100, 256)]
    for scoring in _kinds(Scoring(Shape(), 3, distance_weight=1.0)):
        yield scoring, [scored(50, 7), scored(16, 16)]
    # A large soft cap overflows nothing.
    yield Scoring(Shape(), soft_cap=3.0, magnitude=1000.0), [scored(50, 7)]
    for cap in (0.0, 3.0):
        yield Scoring(Shape(), 3, ring=8, soft_cap=cap, distance_weight=1.6), RINGS


def _native_scorings() -> Iterator[tuple[Scoring, list[Request]]]:
    """Too many and too long to be interpreted."""
    requests = [scored(held, 256) for held in LENGTHS] + [Request(20)]
    layouts = LAYOUTS[:2]
    for dtype, layout, block, size, group in product(
        WIDE, layouts, (16, 32), (64, 128), (1, 4, 8)
    ):
        yield Scoring(Shape(2, size, block, layout, dtype), group), requests
    for dtype, layout in product(FP8, layouts):
        yield _scoring(Shape(2, 128, 16, layout, dtype), 4), requests
    eight_bits = {"query_dtype": _E4M3, "factor": 0.6, "query_factor": 1.7}
    yield Scoring(Shape(2, 64, 16, "NHD", _E4M3), 4, **eight_bits), requests
    for scoring in _kinds(Scoring(Shape(2, 64, 16, "NHD", _HALF), 4)):
        yield scoring, requests
    for group in (1, 4):
        yield Scoring(Shape(2, 64, dtype=_HALF), group, ring=8), RINGS


def cases(device: str, seed: int) -> Iterator[Case]:
    """Every scoring kernel on a device."""

    def case(kernel: str, variant: str, run: Any, *arguments: Any) -> Case:
        return Case(kernel, variant, lambda: run(*arguments, device, seed))

    native = device != "cpu"
    for scoring, requests in (*_scorings(), *(_native_scorings() if native else ())):
        longest = max(request.num_held for request in requests)
        variant = f"{scoring.label}, {len(requests)} x {longest}"
        yield case("score", variant, compare_scores, scoring, requests)
    several = [Request(held) for held in (0, 1, 33, 300)]
    for dtype, size in product((*WIDE, *FP8), (32, 80)):
        shape = Shape(2, size, 16, "NHD", dtype)
        yield case("score_key_norms", shape.label, compare_key_norms, shape, several)
        yield case("score_key_diffs", shape.label, compare_key_diffs, shape, several)
    many = [Request(held, num_recent=held // 4) for held in LENGTHS]
    for dtype, layout in product((*WIDE, *FP8), LAYOUTS[:2]) if native else ():
        shape = Shape(2, 64, 16, layout, dtype)
        yield case("score_key_norms", shape.label, compare_key_norms, shape, many)
        yield case("score_key_diffs", shape.label, compare_key_diffs, shape, many)
    pairs = ((0, 0), (1, 0), (2, 1), (5, 5), (33, 4), (1030, 6), (8, 8))
    recent = [Request(held, num_recent=count) for held, count in pairs]
    for kind, kernel in product(("avg", "max"), (1, 3, 5, 7)):
        for part in (recent, many) if native else (recent,):
            variant = f"{kind} {kernel}, {len(part)} requests"
            yield case("pool_scores", variant, compare_pooling, kind, kernel, part)
