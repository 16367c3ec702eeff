"""Times on the GPU: medians, with nothing of the last run in its cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

_WARM_UP, _MIN_FLUSH = 3, 256 * 2**20


@dataclass(frozen=True)
class Timed:
    """Milliseconds of the same work."""

    launched: float
    """Launched from Python, one by one."""
    replayed: float | None
    """As a graph: the GPU's share of it; None: it could not be captured."""

    @property
    def best(self) -> float:
        """What the GPU needs, as far as it is known."""
        return self.launched if self.replayed is None else self.replayed


class Timer:
    """Times work on the GPU.

    Args:
        repeats: of each measurement.
    """

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        size = max(_MIN_FLUSH, 4 * cache)
        self._flush = torch.empty(size, dtype=torch.uint8, device="cuda")

    def median_ms(self, run: Callable[[], object]) -> float:
        """Of runs that find the cache full of something else."""
        for _ in range(_WARM_UP):
            run()
        events = []
        for _ in range(self._repeats):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)

    def time(self, run: Callable[[], object]) -> Timed:
        """Launched, and replayed where that works."""
        launched = self.median_ms(run)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize()
            return Timed(launched, None)
        replayed = self.median_ms(graph.replay)
        return Timed(launched, replayed)


def copy_bandwidth(timer: Timer) -> float:
    """Bytes read and written a second by a copy much larger than the cache."""
    free, _ = torch.cuda.mem_get_info()
    size = min(2**30, free // 8)
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / timer.median_ms(lambda: target.copy_(source)) * 1e3


def matmul_rate(timer: Timer) -> float:
    """bf16 operations a second of a large square product."""
    size = 8192
    a, b = (
        torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    out = torch.empty_like(a)
    return 2 * size**3 / timer.median_ms(lambda: torch.mm(a, b, out=out)) * 1e3
