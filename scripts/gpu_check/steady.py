"""Launches neither wait for the GPU nor allocate, once all is compiled."""

from collections.abc import Callable, Iterator

import torch

from gpu_check.pieces import FAILED, MET, MISSED, OK, Check, Options, guarded
from gpu_check.workload import Sizes, Step

_WARM_UP, _LAUNCHES = 3, 10


def steady_checks(options: Options) -> Iterator[Check]:
    """Each kernel of a prefill step, by itself."""
    sizes = Sizes(num_requests=2, num_tokens=2048, num_layers=4, num_tiers=1)
    step, all_layers = Step(sizes, "cuda", options.seed), slice(0, 4)
    step.score_layers()
    step.pool(all_layers)
    step.select(all_layers)
    launches: dict[str, Callable[[], None]] = {
        "score": lambda: step.score(0),
        "pool_scores": lambda: step.pool(all_layers),
        "select": lambda: step.select(all_layers),
        "compact_pages": lambda: step.compact(all_layers),
    }
    for name, launch in launches.items():
        for _ in range(_WARM_UP):
            launch()
        torch.cuda.synchronize()
        title = f"{name} waits for nothing"
        yield guarded(title, lambda t=title, run=launch: _waits(t, run))
        title = f"{name} allocates nothing"
        yield guarded(title, lambda t=title, run=launch: _allocates(t, run))


def _waits(title: str, launch: Callable[[], None]) -> Check:
    """torch raises where a call of its own waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(_LAUNCHES):
            launch()
    except RuntimeError as error:
        return Check(title, FAILED, str(error).splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return Check(title, OK, f"{_LAUNCHES} launches")


def _num_allocations() -> int:
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


def _allocates(title: str, launch: Callable[[], None]) -> Check:
    before = _num_allocations()
    for _ in range(_LAUNCHES):
        launch()
    each = (_num_allocations() - before) / _LAUNCHES
    figures = {"allocations_per_launch": each, "goal": 0}
    return Check(title, MISSED if each else MET, f"{each:g} a launch; goal: 0", figures)
