"""Every kernel is compared with its reference; launches must not wait or allocate."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_check.loading import has_gpu, is_interpreted, load_package, need
from gpu_check.pieces import (
    FAILED,
    MEASURED,
    MET,
    MISSED,
    OK,
    SKIPPED,
    Check,
    Options,
    guarded,
)

if TYPE_CHECKING:
    from tests.parity.compared import Case

_WARM_UP, _LAUNCHES = 3, 10


def run(options: Options) -> Iterator[Check]:
    """Run the cases of ``tests/parity`` on the GPU, or interpreted where there is none.

    Raises:
        ValueError: ``--kernels`` has a name of no kernel.
    """
    need("torch", "triton")
    load_package()
    import torch

    from tests.parity.cases import all_cases, some_of
    from tests.parity.paging import LENGTHS, SHORT

    native = has_gpu() and not is_interpreted()
    if not native and not is_interpreted():
        raise RuntimeError("without a GPU, kernels need TRITON_INTERPRET=1")
    # References multiply in float32, not in TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    how = "on the GPU" if native else "interpreted on the CPU: small shapes only"
    figures = {"native": native, "lengths": LENGTHS if native else SHORT}
    yield Check("kernels run", MEASURED, how, figures)
    cases = all_cases("cuda" if native else "cpu", options.seed)
    by_kernel: dict[str, list[Case]] = {}
    for case in some_of(cases) if options.quick else cases:
        by_kernel.setdefault(case.kernel, []).append(case)
    if unknown := set(options.kernels) - by_kernel.keys():
        valid = ", ".join(by_kernel)
        raise ValueError(f"--kernels has {', '.join(sorted(unknown))}: valid: {valid}")
    for kernel in options.kernels or by_kernel:
        yield _check(kernel, [_outcome(case) for case in by_kernel[kernel]])
    if native:
        yield from _steady_checks(options)
    else:
        why = "no NVIDIA GPU: nothing to synchronize with"
        yield Check("steady state", SKIPPED, why)


def _outcome(case: Case) -> dict[str, Any]:
    """Run a case for JSON; an exception fails this case alone."""
    try:
        return {"variant": case.variant} | asdict(case.run())
    except Exception:
        text = traceback.format_exc()
        return {"variant": case.variant, "is_same": False, "traceback": text}


def _check(kernel: str, outcomes: list[dict[str, Any]]) -> Check:
    """The outcomes of all variants of a kernel."""
    wrong = [outcome for outcome in outcomes if not outcome["is_same"]]
    ran = [outcome for outcome in outcomes if "max_error" in outcome]
    figures: dict[str, Any] = {"variants": outcomes, "num_failed": len(wrong)}
    detail = f"{len(outcomes) - len(wrong)} of {len(outcomes)} variants"
    if ran:
        figures["max_error"] = max(outcome["max_error"] for outcome in ran)
        figures["max_relative"] = max(outcome["max_relative"] for outcome in ran)
        detail += f", largest error {figures['max_error']:.2g}"
        detail += f" (limit: {ran[0]['limit']})"
    if wrong:
        detail += f"; first to fail: {wrong[0]['variant']}"
        if "traceback" in wrong[0]:
            detail += f": {wrong[0]['traceback'].strip().splitlines()[-1]}"
    return Check(kernel, FAILED if wrong else OK, detail, figures)


def _steady_checks(options: Options) -> Iterator[Check]:
    """Once all is compiled, launches neither wait for the GPU nor allocate."""
    from gpu_check.workload import Sizes, Step

    sizes = Sizes(num_requests=2, num_tokens=2048, num_layers=4, num_tiers=1)
    step, every = Step(sizes, "cuda", options.seed), slice(0, 4)
    step.prefill()
    launches: dict[str, Callable[[], None]] = {
        "score": lambda: step.score(0),
        "pool_scores": lambda: step.pool(every),
        "select": lambda: step.select(every),
        "compact_pages": lambda: step.compact(every),
    }
    for name, launch in launches.items():
        title = f"{name} neither waits nor allocates"
        yield guarded(title, partial(_steady, title, launch))


def _steady(title: str, launch: Callable[[], None]) -> Check:
    """torch raises an error if one of its own calls waits for the GPU."""
    import torch

    def num_allocations() -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])

    for _ in range(_WARM_UP):
        launch()
    torch.cuda.synchronize()
    before = num_allocations()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(_LAUNCHES):
            launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    each = (num_allocations() - before) / _LAUNCHES
    detail = f"{_LAUNCHES} launches, {each:g} allocations each; goal: 0"
    figures = {"allocations_per_launch": each, "goal": 0}
    return Check(title, MISSED if each else MET, detail, figures)
