"""Times on the GPU: Triton's medians, with a cache that is emptied before each run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timed:
    """Milliseconds of the same work."""

    launched: float
    """Time of kernels that Python launches one by one."""
    replayed: float | None
    """Time as a graph, the GPU's share; None: the work could not be captured."""

    @property
    def best(self) -> float:
        """The GPU's time, as far as it is known."""
        return self.launched if self.replayed is None else self.replayed

    def __str__(self) -> str:
        return f"{self.best:.3f} ms (launched {self.launched:.3f})"


@dataclass(frozen=True)
class Timer:
    """Times work on the GPU, each for about so many milliseconds."""

    repeat_ms: int

    def median_ms(self, run: Callable[[], object]) -> float:
        """Milliseconds of one run."""
        from triton.testing import do_bench

        return float(do_bench(run, rep=self.repeat_ms, return_mode="median"))

    def time(self, run: Callable[[], object]) -> Timed:
        """Time the work launched, and replayed if it can be captured."""
        launched, graph = self.median_ms(run), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize()
            return Timed(launched, None)
        return Timed(launched, self.median_ms(graph.replay))


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
    a = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(a)
    return 2 * size**3 / timer.median_ms(lambda: torch.mm(a, a, out=out)) * 1e3
