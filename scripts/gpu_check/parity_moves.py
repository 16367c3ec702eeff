"""Kernels that select and move, beside their references."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from gpu_check.compared import Case, Compared, all_of, exactly
from gpu_check.paged import Pages, Request, Shape
from gpu_check.parity_scores import FP8, WIDE
from pyramid_vllm.kernels import compact, select_tokens, select_triton
from pyramid_vllm.kernels.compact_triton import compact_pages, gather_into_pages


def _levels(pages: Pages, held: int, levels: int) -> torch.Tensor:
    """``[2, 2, held]``: scores of as many values, with zeros of either sign."""
    size, random = (2, 2, held), {"generator": pages.random, "device": pages.device}
    if not levels:
        return torch.randn(size, **random)
    scores = torch.randint(0, levels, size, **random).float() - levels // 2
    return scores * (torch.randint(0, 2, size, **random) * 2 - 1)


def compare_selection(
    requests: list[Request], levels: int, device: str, seed: int
) -> Compared:
    """Given the same scores, the same tokens: of equal ones the newer."""
    pages = Pages(Shape(head_size=16), requests, device, seed)
    size = (2, 2, pages.num_scores)
    flat = torch.full(size, float("nan"), device=device)
    out = torch.full(size, -1, dtype=torch.int32, device=device)
    expected = out.clone()
    for request, begin in zip(requests, pages.offsets, strict=True):
        scores = _levels(pages, request.held, levels)
        flat[..., begin : begin + request.held] = scores
        if request.kept == request.held:
            continue
        for layer in range(2):
            chosen = select_tokens(
                scores[layer], request.kept, request.first, request.recent
            )
            expected[layer, :, begin : begin + request.kept] = chosen
    longest = max(request.held for request in requests)
    select_triton.select(flat, out, pages.spans(), max_tokens=longest)
    return exactly(out, expected)


def kept_of(pages: Pages, groups: int) -> torch.Tensor:
    """``[layers, groups, num_scores]``: random tokens that stay, the first among
    them."""
    size = (pages.shape.layers, groups, pages.num_scores)
    kept = torch.zeros(size, dtype=torch.int32)
    on_host = torch.Generator().manual_seed(pages.num_scores)
    for request, begin in zip(pages.requests, pages.offsets, strict=True):
        first = request.first
        for row in kept.flatten(0, 1):
            order = torch.randperm(request.held - first, generator=on_host)
            chosen = order[: request.kept - first].sort().values + first
            row[begin : begin + first] = torch.arange(first)
            row[begin + first : begin + request.kept] = chosen
    return kept.to(pages.device)


def compare_compaction(
    shape: Shape, groups: int, requests: list[Request], device: str, seed: int
) -> Compared:
    """Byte by byte, of all pages: nothing else is touched."""
    pages = Pages(shape, requests, device, seed)
    pages.randomize()
    kept = kept_of(pages, groups)
    before = [cache.view(torch.uint8).clone() for cache in pages.caches]
    width = before[0].shape[-1] // 2
    for layer, i in product(range(shape.layers), range(len(requests))):
        request, begin, ids = requests[i], pages.offsets[i], pages.block_ids(i)
        if request.kept >= request.held:
            continue
        chosen = kept[layer, :, begin : begin + request.kept].long()
        key, value = before[layer][..., :width], before[layer][..., width:]
        compact(key, value, ids, ids, chosen)
    compact_pages(
        pages.paged(), pages.paged("values"), pages.table, pages.spans(), kept
    )
    parts = zip(pages.caches, before, strict=True)
    return all_of([exactly(cache.view(torch.uint8), b) for cache, b in parts])


def compare_gathering(dtype: torch.dtype, device: str, seed: int) -> Compared:
    """Into other pages; those that are read stay as they are."""
    pages = Pages(Shape(dtype=dtype), [Request(40, 20), Request(40)], device, seed)
    sides = ("keys", "values")
    before = [pages.tokens(0, 0, of).view(torch.uint8).clone() for of in sides]
    kept = torch.arange(0, 40, 2, dtype=torch.int32, device=device)[None]
    gather_into_pages(
        pages.keys[0], pages.values[0], pages.block_ids(0), pages.block_ids(1), kept
    )
    parts = []
    for of, tokens in zip(sides, before, strict=True):
        moved = pages.tokens(0, 1, of).view(torch.uint8)[:20]
        stayed = pages.tokens(0, 0, of).view(torch.uint8)
        parts += [exactly(moved, tokens[::2]), exactly(stayed, tokens)]
    return all_of(parts)


def _selections(lengths: list[int]) -> list[Request]:
    """Few, half, all but one and all of the tokens."""
    requests = []
    for held in lengths:
        first, recent = held // 10, held // 5
        counts = {first + recent, (first + recent + held) // 2, max(0, held - 1), held}
        for kept in sorted(counts):
            if kept >= first + recent:
                requests.append(Request(held, kept, first, recent))
    return requests


def _movings(small: bool) -> Iterator[tuple[Shape, int]]:
    """Pages, and whether each head keeps tokens of its own."""
    every = product((*WIDE, *FP8), ("NHD", "HND"), (64, 128), (16, 32), (1, 2))
    for i, (dtype, layout, size, page, groups) in enumerate(every):
        # Quickly: one in five, so that every value of every dimension is there.
        if not small or i % 5 == 0:
            yield Shape(2, size, page, layout, dtype), groups


def cases(lengths: list[int], small: bool, device: str, seed: int) -> Iterator[Case]:
    """Selection and moves; arguments as of ``parity_scores.cases``."""
    chosen = _selections(lengths)
    for levels in (0, 1, 3, 1000):
        name = f"scores of {levels or 'all'} values"
        yield Case(
            "select",
            name,
            lambda levels=levels: compare_selection(chosen, levels, device, seed),
        )
    moved = [Request(held, held - held // 3, held // 9) for held in lengths]
    longest = max(lengths)
    moved += [Request(33, 33), Request(17, 0), Request(longest, longest - 1)]
    for shape, groups in _movings(small):

        def run(shape: Shape = shape, groups: int = groups) -> Compared:
            return compare_compaction(shape, groups, moved, device, seed)

        how = "by head" if groups == 2 else "by layer"
        yield Case("compact_pages", f"{shape.label}, {how}", run)
    for dtype in (torch.bfloat16, FP8[0]):
        yield Case(
            "gather_into_pages",
            str(dtype),
            lambda dtype=dtype: compare_gathering(dtype, device, seed),
        )
