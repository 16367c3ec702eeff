"""Compile the Triton kernels for GPUs, as the calls that use them would.

Needs no GPU, but a process of its own: ``TRITON_INTERPRET`` must not be set. What is
compiled is written to standard output, one JSON object a line.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pyramid_vllm.kernels import (
    compact_triton,
    lengths_triton,
    norms_triton,
    prune_triton,
    queries_triton,
    score_triton,
    select_triton,
)
from tests.parity.paging import FP8, LAYOUTS, Cache, Request, Shape, ones, queries_of


class _Driver:
    """A stand-in for a GPU's driver: kernels are specialized for it."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _resources(cubin: bytes) -> dict[str, int]:
    """What a kernel takes of a GPU's registers and memories."""
    tool = Path(knobs.nvidia.ptxas.path).with_name("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout
    return {
        name.lower(): int(n) for name, n in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", text)
    }


def _record(kernel: Any, capability: int, variant: str) -> None:
    ptx = kernel.asm["ptx"]
    found = {
        "kernel": kernel.metadata.name,
        "capability": capability,
        "variant": variant,
        # How memory is read, written and waited for, in the order of the code.
        "order": re.findall(r"\b((?:ld|st)\.global[.\w]*|bar\.sync)", ptx),
        "shared": kernel.metadata.shared,
        "resources": _resources(kernel.asm["cubin"]),
    }
    print(json.dumps(found), flush=True)


class _Launches:
    """Makes every launch compile and nothing else, and writes what was compiled."""

    def __init__(self) -> None:
        self.capability, self.variant = 0, ""
        self._run, self._seen = JITFunction.run, set[tuple[int, str]]()

    def install(self) -> None:
        def run(
            kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any
        ) -> Any:
            return self._compile(kernel, *args, grid=grid, **options)

        JITFunction.run = run

    def use(self, capability: int) -> None:
        self.capability = capability
        triton.runtime.driver.set_active(_Driver(capability))

    def _compile(self, kernel: Any, *args: Any, **options: Any) -> Any:
        compiled = self._run(kernel, *args, warmup=True, **options)
        if (self.capability, compiled.hash) not in self._seen:
            self._seen.add((self.capability, compiled.hash))
            _record(compiled, self.capability, self.variant)
        return compiled


_REQUESTS = [
    Request(num_held=96, num_kept=40, num_first=4, num_recent=16, num_queries=16),
    Request(num_held=33, num_kept=33, num_queries=8),
]


def scoring(
    shape: Shape,
    group: int,
    query_dtype: torch.dtype,
    requests: list[Request] = _REQUESTS,
    first_layer: int = 0,
    sinks: bool = False,
    **options: Any,
) -> None:
    cache = Cache(shape, requests)
    query, starts, _ = queries_of(cache, group, query_dtype)
    layers = slice(first_layer, None)
    keys, (scales, _held) = cache.paged(), ones(shape.num_layers)
    out = torch.zeros(shape.num_layers, shape.num_heads, cache.num_scores)
    logits = torch.zeros(shape.num_layers, shape.num_heads * group)[layers]
    sizes = {"max_queries": 16, "max_tokens": 96, "max_columns": 96, "scale": 0.3}
    score_triton.score(
        query,
        torch.arange(shape.num_layers)[layers],
        keys._replace(addresses=keys.addresses[layers]),
        cache.table,
        cache.spans(starts),
        out[layers],
        query_scale=torch.ones(1),
        key_scales=scales[layers],
        sink_logits=logits if sinks else None,
        **(sizes | options),
    )


def moving(shape: Shape, groups: int, requests: list[Request] = _REQUESTS) -> None:
    cache = Cache(shape, requests)
    kept = torch.zeros(shape.num_layers, groups, cache.num_scores, dtype=torch.int32)
    compact_triton.compact_pages(
        cache.paged(), cache.paged("values"), cache.table, cache.spans(), kept
    )


def norms(shape: Shape) -> None:
    cache = Cache(shape, _REQUESTS)
    out = torch.zeros(shape.num_layers, shape.num_heads, cache.num_scores)
    norms_triton.score_key_norms(
        cache.paged(), cache.table, cache.spans(), out, max_tokens=96
    )
    norms_triton.score_key_diffs(cache.paged(), cache.table, cache.spans(), out)


def selecting(
    groups: int, max_tokens: int, requests: list[Request] = _REQUESTS
) -> None:
    cache = Cache(Shape(), requests)
    scores = torch.zeros(2, groups, cache.num_scores)
    out = torch.zeros(2, groups, cache.num_scores, dtype=torch.int32)
    select_triton.select(scores, out, cache.spans(), max_tokens=max_tokens)


def pooling(kind: str) -> None:
    cache = Cache(Shape(), _REQUESTS)
    scores = torch.zeros(2, 2, cache.num_scores)
    score_triton.pool_scores(
        scores, torch.zeros_like(scores), cache.spans(), kind, 7, max_columns=96
    )


def lengths(prunes: bool, num_requests: int = 5) -> None:
    rows = torch.zeros(3, num_requests + 1, dtype=torch.int32)
    lengths_triton.tier_lengths(
        rows[0, 1:],
        rows[0],
        rows[:, 1:].contiguous(),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.uint64),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(3, 64, dtype=torch.int32),
        torch.zeros(4, 64, dtype=torch.int64),
        block_size=16,
        num_rows=rows[:, 1:].contiguous() if prunes else None,
        row_starts=rows if prunes else None,
    )


def pruning(dtype: torch.dtype, width: int) -> None:
    index = torch.zeros(3, dtype=torch.int32)
    prune_triton.row_indices(index, index, index[:2], index, index, index)
    rows = prune_triton.gather_rows(torch.zeros(5, width, dtype=dtype), index)
    prune_triton.scatter_rows(rows, index, 5)


def storing(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    cache = Cache(Shape(), _REQUESTS)
    index = torch.zeros(4, dtype=torch.int32)
    query = torch.zeros(4, 9, 64).to(dtype)
    out = torch.zeros(16, 9, 64, dtype=out_dtype)
    tags = torch.zeros(2, 16, dtype=torch.int32)
    queries_triton.store_queries(query, index, index, torch.ones(1), out, tags[0])
    queries_triton.count_missing(tags, cache.spans(), index, index[:1], 8)


HALF = torch.bfloat16


def variants(every: bool) -> dict[str, Callable[[], None]]:
    """Calls by name: a representative few, or every one."""
    half, e4m3 = HALF, FP8[0]
    nhd, hnd = LAYOUTS[1], LAYOUTS[0]
    few: dict[str, Callable[[], None]] = {
        "score bf16": lambda: scoring(Shape(8, 128, 16, nhd, half), 4, half),
        "score fp8": lambda: scoring(Shape(8, 128, 16, hnd, e4m3), 4, half),
        "norms bf16": lambda: norms(Shape(8, 128, 16, nhd, half)),
        "norms fp8": lambda: norms(Shape(8, 128, 16, nhd, e4m3)),
        "pool avg": lambda: pooling("avg"),
        "pool max": lambda: pooling("max"),
        "select one block": lambda: selecting(1, 96),
        "select blocks": lambda: selecting(2, 9000),
        "compact bf16": lambda: moving(Shape(8, 128, 16, nhd, half), 1),
        "compact fp8": lambda: moving(Shape(8, 128, 16, nhd, e4m3), 8),
        "lengths": lambda: lengths(False),
        "lengths pruned": lambda: lengths(True),
        "rows bf16": lambda: pruning(half, 2048),
        "queries bf16": lambda: storing(half, half),
        "queries fp8": lambda: storing(e4m3, half),
    }
    for count in (1, 3, 16, 37):
        few[f"again with {count}"] = partial(again, count)
    return few | _others() if every else few


def again(num_requests: int) -> None:
    """Calls with other numbers of requests and other layers, which need no new
    compilation."""
    requests, shape = _REQUESTS[:1] * num_requests, Shape(8, 128, 16, LAYOUTS[1], HALF)
    for first_layer in range(2):
        scoring(shape, 4, HALF, requests, first_layer)
    selecting(1, 96, requests)
    moving(shape, 1, requests)
    lengths(False, num_requests)
    lengths(True, num_requests)


def _others() -> dict[str, Callable[[], None]]:
    half, single, e4m3, e5m2 = HALF, torch.float32, *FP8
    nhd, hnd = LAYOUTS[1], LAYOUTS[0]
    return {
        "score fp32": lambda: scoring(Shape(8, 128, 16, nhd, single), 4, single),
        "score fp32 small": lambda: scoring(Shape(3, 64, 16, nhd, single), 3, single),
        "score fp16": lambda: scoring(
            Shape(8, 64, 32, hnd, torch.float16),
            1,
            torch.float16,
            logits_soft_cap=30.0,
        ),
        "score bf16 80 sinks votes": lambda: scoring(
            Shape(2, 80, 32, "separate_NHD", half), 3, half, sinks=True, kind=2
        ),
        "score bf16 accumulated": lambda: scoring(
            Shape(8, 128, 16, nhd, half), 4, half, kind=1
        ),
        "score bf16 256": lambda: scoring(Shape(4, 256, 16, nhd, half), 4, half),
        "score fp32 256": lambda: scoring(Shape(4, 256, 16, nhd, single), 4, single),
        "score ring": lambda: scoring(Shape(8, 128, 16, nhd, half), 4, half, ring=16),
        "score one query": lambda: scoring(
            Shape(8, 128, 16, nhd, half), 4, half, max_queries=1
        ),
        "score long": lambda: scoring(
            Shape(8, 128, 16, nhd, half), 4, half, max_tokens=1 << 19, max_queries=64
        ),
        "score e5m2": lambda: scoring(Shape(8, 128, 16, hnd, e5m2), 4, half),
        "score fp8 queries": lambda: scoring(Shape(8, 128, 16, hnd, e4m3), 4, e4m3),
        "norms fp32": lambda: norms(Shape(8, 80, 16, nhd, single)),
        "compact fp32": lambda: moving(Shape(8, 128, 16, nhd, single), 1),
        "compact bf16 HND": lambda: moving(Shape(8, 128, 32, hnd, half), 8),
        "compact bf16 80": lambda: moving(Shape(8, 80, 32, hnd, half), 8),
        "compact bf16 256": lambda: moving(Shape(8, 256, 32, hnd, half), 8),
        "compact fp32 256": lambda: moving(Shape(8, 256, 32, hnd, single), 8),
        "rows fp32": lambda: pruning(single, 576),
        "rows int64": lambda: pruning(torch.int64, 1),
        "queries fp32": lambda: storing(single, single),
    }


def main() -> None:
    launches = _Launches()
    launches.install()
    for capability in map(int, sys.argv[1].split(",")):
        launches.use(capability)
        for name, call in variants("--every" in sys.argv).items():
            launches.variant = name
            call()


if __name__ == "__main__":
    main()
