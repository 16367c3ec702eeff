"""Kernels that score, beside their references."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from gpu_check.compared import Case, Compared, within
from gpu_check.paged import Pages, Request, Shape
from pyramid_vllm.kernels import (
    accumulated_scores,
    key_norm_scores,
    pooled,
    score_triton,
    vote_scores,
    window_scores,
)
from pyramid_vllm.kernels.scratch import Scratch

_UNTOUCHED = -7.0
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDE = (torch.float32, torch.float16, torch.bfloat16)
#: Products of both are exact in float32, so that sums alone differ; float32 itself is
#: multiplied in three parts of TF32.
_RELATIVE, _ABSOLUTE = 5e-4, 2e-6
KINDS = ("attention", "accumulated", "votes")


@dataclass(frozen=True)
class Scoring:
    """How requests are scored."""

    shape: Shape
    group: int = 4
    kind: int = score_triton.ATTENTION
    query_dtype: torch.dtype | None = None
    """None: that of the keys."""
    ring: int | None = None
    soft_cap: float = 0.0
    has_sinks: bool = False
    factor: float = 1.0
    """Of the first layer's quantized keys; of each further one 1 more."""
    query_factor: float = 1.0
    distance_weight: float = 1.3

    @property
    def label(self) -> str:
        parts = [KINDS[self.kind], self.shape.label, f"group {self.group}"]
        parts += [f"queries {self.query_dtype}"] if self.query_dtype else []
        parts += ["ring"] if self.ring else []
        parts += [f"cap {self.soft_cap:g}"] if self.soft_cap else []
        return ", ".join(parts + ["sinks"] * self.has_sinks)


@functools.cache
def _scratch(device: str) -> Scratch:
    """One for all launches: what others have left there must not matter."""
    return Scratch(torch.device(device))


def score_pages(
    pages: Pages, scoring: Scoring, query: torch.Tensor, starts: list[int],
    out: torch.Tensor, sinks: torch.Tensor | None,
) -> None:  # fmt: skip
    """One launch for all layers and requests."""
    layers, requests = pages.shape.layers, pages.requests
    factors = scoring.factor + torch.arange(layers, device=pages.device)
    addresses = [factors[i : i + 1].data_ptr() for i in range(layers)]
    score_triton.score(
        query,
        torch.arange(layers, device=pages.device),
        pages.paged(),
        pages.table,
        pages.spans(starts),
        out,
        max_queries=scoring.ring or max(request.queries for request in requests),
        max_tokens=max(request.held for request in requests),
        max_columns=max(request.num_columns for request in requests),
        scale=pages.shape.head_size**-0.5,
        query_scale=torch.tensor([scoring.query_factor], device=pages.device),
        key_scales=torch.tensor(addresses, device=pages.device),
        distance_weight=scoring.distance_weight,
        kind=scoring.kind,
        logits_soft_cap=scoring.soft_cap,
        sink_logits=sinks,
        ring=scoring.ring,
        scratch=_scratch(pages.device),
    )


def _expected(
    pages: Pages, scoring: Scoring, layer: int, i: int, rows: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """``[heads, held]`` of a request, by the reference."""
    request = pages.requests[i]
    place = torch.arange(request.queries, device=pages.device)
    if scoring.ring:
        place = (place + request.ring_start) % scoring.ring
    query = rows[place].float() * scoring.query_factor
    key = pages.tokens(layer, i).float() * (scoring.factor + layer)
    scale = pages.shape.head_size**-0.5
    more = (scoring.soft_cap, None if sinks is None else sinks[layer])
    if scoring.kind == score_triton.ATTENTION:
        return window_scores(query, key, scale, scoring.distance_weight, *more)
    if scoring.kind == score_triton.ACCUMULATED:
        return accumulated_scores(query, key, scale, *more)
    return vote_scores(query, key, scale, *more)


def compare_scores(
    scoring: Scoring, requests: list[Request], device: str, seed: int
) -> Compared:
    """All requests in one launch."""
    shape = scoring.shape
    pages = Pages(shape, requests, device, seed)
    query, starts = pages.queries(
        scoring.group, scoring.query_dtype or shape.dtype, scoring.ring
    )
    sinks = None
    if scoring.has_sinks:
        size = (shape.layers, shape.heads * scoring.group)
        sinks = torch.randn(size, generator=pages.random, device=device)
    size = (shape.layers, shape.heads, pages.num_scores)
    out = torch.full(size, _UNTOUCHED, device=device)
    expected = out.clone()
    score_pages(pages, scoring, query, starts, out, sinks)
    for layer, i in product(range(shape.layers), range(len(requests))):
        request, begin = requests[i], pages.offsets[i]
        if not request.queries:
            continue
        rows = query[layer, starts[i] :]
        values = _expected(pages, scoring, layer, i, rows, sinks)
        first, count = request.column, request.num_columns
        expected[layer, :, begin : begin + count] = values[:, first : first + count]
    if scoring.kind == score_triton.VOTES:
        return _votes(out, expected, scoring.group)
    return within(out, expected, _RELATIVE, _ABSOLUTE)


def _votes(found: torch.Tensor, expected: torch.Tensor, group: int) -> Compared:
    """A share of attention that is all but the mean may be a vote or none."""
    errors = (found - expected).abs()
    share = (errors > 1e-3).float().mean().item()
    largest = errors.max().item()
    same = share <= 0.01 and largest <= 2.0 / group + 1e-3
    limit = "2 heads' votes in 1% of the places"
    return Compared(same, largest, share, found.numel(), limit)


def compare_key_norms(
    shape: Shape, requests: list[Request], device: str, seed: int
) -> Compared:
    """Of every layer and request."""
    pages = Pages(shape, requests, device, seed)
    size = (shape.layers, shape.heads, pages.num_scores)
    out = torch.full(size, _UNTOUCHED, device=device)
    expected = out.clone()
    score_triton.score_key_norms(
        pages.paged(),
        pages.table,
        pages.spans(),
        out,
        max_tokens=max(request.held for request in requests),
    )
    for layer, i in product(range(shape.layers), range(len(requests))):
        begin = pages.offsets[i]
        norms = key_norm_scores(pages.tokens(layer, i).float())
        expected[layer, :, begin : begin + requests[i].held] = norms
    return within(out, expected, 1e-5, 1e-6)


def compare_pooling(
    kind: str, kernel: int, requests: list[Request], device: str, seed: int
) -> Compared:
    """Beside ``pooled``."""
    pages = Pages(Shape(head_size=16, layers=2), requests, device, seed)
    size = (2, 2, pages.num_scores)
    scores = torch.randn(size, generator=pages.random, device=device)
    out = torch.full_like(scores, _UNTOUCHED)
    expected = out.clone()
    longest = max(request.held for request in requests)
    score_triton.pool_scores(
        scores, out, pages.spans(), kind, kernel, max_tokens=longest
    )
    for request, begin in zip(requests, pages.offsets, strict=True):
        place = slice(begin, begin + request.held)
        for layer in range(2):
            part = pooled(scores[layer, :, place], request.recent, kind, kernel)
            expected[layer, :, place] = part
    return within(out, expected, 1e-5, 1e-6)


def _shapes(small: bool) -> Iterator[tuple[Shape, int]]:
    """Shapes and heads of each KV head."""
    if not small:
        for dtype, layout, page, size, group in product(
            WIDE, ("NHD", "HND"), (16, 32), (64, 128), (1, 4, 8)
        ):
            yield Shape(2, size, page, layout, dtype), group
        return
    # Every value of every dimension, not every combination.
    yield Shape(2, 64, 16, "NHD", WIDE[0]), 1
    yield Shape(2, 128, 32, "HND", WIDE[1]), 4
    yield Shape(1, 64, 32, "NHD", WIDE[2], 1), 8
    yield Shape(2, 128, 16, "HND", WIDE[2]), 4


def _scorings(small: bool) -> Iterator[Scoring]:
    for shape, group in _shapes(small):
        yield Scoring(shape, group)
    for dtype, layout in product(FP8, ("NHD", "HND")):
        narrow = Shape(2, 64 if small else 128, 16, layout, dtype)
        yield Scoring(narrow, 4, query_dtype=torch.bfloat16, factor=0.7)
    narrow = Shape(2, 64, 16, "NHD", FP8[0])
    yield Scoring(narrow, 4, query_dtype=FP8[0], factor=0.6, query_factor=1.7)
    plain = Scoring(Shape(2, 64, 16, "NHD", torch.bfloat16), 2 if small else 4)
    both = [(0.0, False), (2.0, True), (2.0, False), (0.0, True)]
    for kind, (cap, sinks) in product(range(3), both[:2] if small else both):
        yield replace(plain, kind=kind, soft_cap=cap, has_sinks=sinks)


def cases(lengths: list[int], small: bool, device: str, seed: int) -> Iterator[Case]:
    """Every scoring kernel.

    Args:
        lengths: of the requests of each launch.
        small: whether kernels are interpreted, or the check is to be quick.
        device: where.
        seed: of everything random.
    """
    newest = 5 if device == "cpu" else 256
    requests = [Request(held, queries=min(held, newest)) for held in lengths]
    # One that is not scored.
    requests.append(Request(20))

    def case(kernel: str, variant: str, run: Any, *arguments: Any) -> Case:
        return Case(kernel, variant, lambda: run(*arguments, device, seed))

    for scoring in _scorings(small):
        yield case("score", scoring.label, compare_scores, scoring, requests)
    rings = [
        Request(40, queries=8, ring_start=3, column=11, columns=7),
        Request(23, queries=1, ring_start=7, column=5, columns=7),
        Request(64, queries=5, column=40, columns=7),
    ]
    for group in (1, 4):
        scoring = Scoring(Shape(dtype=torch.bfloat16), group, ring=8)
        yield case("score", scoring.label, compare_scores, scoring, rings)
    for dtype, layout in product((*WIDE, *FP8), ("NHD", "HND")):
        shape = Shape(2, 64, 16, layout, dtype)
        yield case("score_key_norms", shape.label, compare_key_norms, shape, requests)
    recent = [Request(held, recent=held // 4) for held in lengths]
    for kind, kernel in product(("avg", "max"), (1, 3, 5, 7)):
        variant = f"{kind} {kernel}"
        yield case("pool_scores", variant, compare_pooling, kind, kernel, recent)
