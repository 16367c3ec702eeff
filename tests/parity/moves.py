"""Cases of the kernels that select and move."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from pyramid_vllm.kernels import compact, select_tokens, select_triton
from pyramid_vllm.kernels.compact_triton import compact_pages
from pyramid_vllm.kernels.scratch import Scratch
from tests.parity.compared import Case, Compared, all_of, exactly
from tests.parity.paging import (
    FP8,
    LAYOUTS,
    LENGTHS,
    SHORT,
    WIDE,
    Cache,
    Request,
    Shape,
    in_bytes,
)

_HALF = torch.bfloat16


def levels_of(
    cache: Cache, num_held: int, levels: int, num_layers: int
) -> torch.Tensor:
    """``[num_layers, 2, num_held]``: scores of so many values; 0: of any.

    Some are negative, and zeros have either sign.
    """
    size = (num_layers, 2, num_held)
    if not levels:
        return cache.randn(*size)
    scores = cache.randint(0, levels, *size).float() - levels // 2
    return scores * (cache.randint(0, 2, *size) * 2 - 1)


def compare_selection(cache: Cache, scores: list[torch.Tensor]) -> Compared:
    """Given the same scores, the same tokens: of equal ones the newer.

    Args:
        cache: its requests are selected.
        scores: of each request, ``[num_layers, num_groups, num_held]``.
    """
    size = (*scores[0].shape[:2], cache.num_scores)
    flat = torch.full(size, torch.nan, device=cache.device)
    out = torch.full(size, -1, dtype=torch.int32, device=cache.device)
    expected = out.clone()
    for request, part, begin in zip(cache.requests, scores, cache.offsets, strict=True):
        first, kept = request.column, request.num_kept
        flat[..., begin : begin + request.num_held - first] = part[..., first:]
        if kept == request.num_held:
            continue
        for layer, of_layer in enumerate(part):
            stays = select_tokens(of_layer, kept, request.num_first, request.num_recent)
            expected[layer, :, begin : begin + kept - first] = stays[:, first:]
    longest = max(request.num_held for request in cache.requests)
    select_triton.select(flat, out, cache.spans(), max_tokens=longest)
    return exactly(out, expected)


def compare_levels(
    requests: list[Request],
    levels: int,
    num_layers: int,
    device: str = "cpu",
    seed: int = 0,
) -> Compared:
    """Select by random scores."""
    cache = Cache(Shape(), requests, seed, device)
    scores = [levels_of(cache, one.num_held, levels, num_layers) for one in requests]
    return compare_selection(cache, scores)


def _kept(cache: Cache, groups: int) -> torch.Tensor:
    """``[num_layers, groups, num_scores]``: random tokens that stay, the first ones
    among them; as ``select`` leaves it where all stay."""
    size = (cache.shape.num_layers, groups, cache.num_scores)
    kept = torch.zeros(size, dtype=torch.int32)
    on_host = torch.Generator().manual_seed(cache.num_scores)
    for request, begin in zip(cache.requests, cache.offsets, strict=True):
        first = request.num_first
        if request.num_kept == request.num_held:
            continue
        for row in kept.flatten(0, 1):
            order = torch.randperm(request.num_held - first, generator=on_host)
            chosen = order[: request.num_kept - first].sort().values + first
            row[begin : begin + first] = torch.arange(first)
            row[begin + first : begin + request.num_kept] = chosen
    return kept.to(cache.device)


def compare_compaction(
    shape: Shape,
    groups: int,
    requests: list[Request],
    device: str = "cpu",
    seed: int = 0,
) -> Compared:
    """Compare all pages byte by byte: nothing else is touched."""
    cache = Cache(shape, requests, seed, device)
    cache.randomize()
    kept = _kept(cache, groups)
    pages = [in_bytes(part) for part in (*cache.keys, *cache.values)]
    expected = [part.clone() for part in pages]
    for layer, i in product(range(shape.num_layers), range(len(requests))):
        request, begin, ids = requests[i], cache.offsets[i], cache.block_ids(i)
        if request.num_kept < request.num_held:
            chosen = kept[layer, :, begin : begin + request.num_kept].long()
            value = expected[shape.num_layers + layer]
            compact(expected[layer], value, ids, ids, chosen)
    compact_pages(
        cache.paged(), cache.paged("values"), cache.table, cache.spans(), kept
    )
    return all_of([exactly(*pair) for pair in zip(pages, expected, strict=True)])


def compare_gathering(
    dtype: torch.dtype, is_ordered: bool, device: str, seed: int
) -> Compared:
    """Gather after a shared page: into another request's pages, or into the request's
    own last ones, which hold tokens that are still to be read."""
    shape = Shape(dtype=dtype, layout="NHD")
    requests = [Request(90, 40, 16, column=16, num_columns=74), Request(60)]
    cache = Cache(shape, requests, seed, device)
    cache.randomize()
    kept = torch.zeros(2, 1, cache.num_scores, dtype=torch.int32)
    begin = cache.offsets[0]
    chosen = torch.cat((torch.arange(16), torch.arange(18, 90, 3)))
    kept[..., begin : begin + 24] = chosen[16:]
    own, other = cache.block_ids(0), cache.block_ids(1)
    pages = other[:2] if is_ordered else own[-2:]
    targets = torch.full((2, 6), -1, dtype=torch.int32, device=device)
    targets[0, 1:3] = pages
    everything = [in_bytes(part) for part in (*cache.keys, *cache.values)]
    expected = [part.clone() for part in everything]
    to = torch.cat((own[:1], pages))
    for layer in range(2):
        value = expected[2 + layer]
        compact(expected[layer], value, own, to, chosen[None].to(device))
    keys, values, spans = cache.paged(), cache.paged("values"), cache.spans()
    scratch = None if is_ordered else Scratch(torch.device(device))
    compact_pages(
        keys, values, cache.table, spans, kept.to(device), targets, scratch=scratch
    )
    return all_of([exactly(*pair) for pair in zip(everything, expected, strict=True)])


def _selections(lengths: list[int]) -> list[Request]:
    """Few, half, all but one and all of the tokens stay."""
    return [
        Request(held, kept, first, recent)
        for held in lengths
        for first, recent in [(held // 10, held // 5)]
        for kept in sorted(
            {first + recent, (first + recent + held) // 2, held - 1, held}
        )
        if kept >= first + recent
    ]


def _selected(native: bool) -> Iterator[tuple[list[Request], int, int]]:
    """Requests, of how many values their scores are, and layers."""
    many = _selections([1, 2, 16, 17, 33, 1000])
    for levels in (0, 1, 3, 1000):
        yield many, levels, 1
        if native:
            yield _selections(LENGTHS), levels, 2
    # In one block, and in several.
    for held, levels in product((4095, 4096, 4097, 8192), (0, 1, 3)):
        yield [Request(held, held // 3, 4, 64), Request(100, 50, 4, 10)], levels, 1
    # Scores of generated tokens begin at the first token that has one.
    groups = [
        Request(60, 51, 20, 30, column=20, num_columns=10),
        Request(33, 28, 11, 12, column=11, num_columns=10),
    ]
    yield groups, 4, 2


def _moved(native: bool) -> Iterator[tuple[Shape, int, list[Request]]]:
    """Pages, how many heads keep tokens of their own, and requests."""
    few = [Request(40, 23, 4), Request(33, 33), Request(17, 0), Request(0)]
    dtypes = (*WIDE, *FP8)
    for groups, layout, dtype in product((1, 2), LAYOUTS, dtypes):
        yield Shape(2, 32, 16, layout, dtype), groups, few
    several = [Request(held, held - held // 3, held // 9) for held in SHORT]
    for size in (64, 80, 128):
        yield Shape(2, size, 32, "NHD", _HALF), 2, several
    for held in (1000, 4097):  # over several blocks, whose ranges overlap
        requests = [Request(held, held - 1), Request(held, held // 2, 64)]
        yield Shape(1, 32, 16, "HND", _HALF, 1), 1, requests
    if not native:
        return
    many = [Request(held, held - held // 3, held // 9) for held in LENGTHS]
    many += [Request(33, 33), Request(17, 0), Request(8192, 8191)]
    for dtype, layout, size, block, groups in product(
        dtypes, LAYOUTS[:2], (64, 128), (16, 32), (1, 2)
    ):
        yield Shape(2, size, block, layout, dtype), groups, many


def cases(device: str, seed: int) -> Iterator[Case]:
    """Selection and moves on a device."""

    def case(kernel: str, variant: str, run: Any, *arguments: Any) -> Case:
        return Case(kernel, variant, lambda: run(*arguments, device, seed))

    native = device != "cpu"
    for requests, levels, layers in _selected(native):
        longest = max(request.num_held for request in requests)
        variant = f"scores of {levels or 'all'} values, {len(requests)} x {longest}"
        yield case("select", variant, compare_levels, requests, levels, layers)
    for shape, groups, requests in _moved(native):
        how = "by head" if groups == 2 else "by layer"
        variant = f"{shape.label}, {how}, {len(requests)} requests"
        yield case(
            "compact_pages", variant, compare_compaction, shape, groups, requests
        )
    for dtype, is_ordered in product((_HALF, FP8[0]), (True, False)):
        how = "elsewhere" if is_ordered else "into pages that are still read"
        variant = f"{dtype}, {how}"
        yield case("compact_pages", variant, compare_gathering, dtype, is_ordered)
