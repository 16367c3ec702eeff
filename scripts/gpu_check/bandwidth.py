"""Achieved bandwidth of the kernels, and their share of a prefill step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gpu_check.loading import Skip, load_package, need, need_gpu
from gpu_check.pieces import (
    MEASURED,
    MET,
    MISSED,
    SKIPPED,
    Check,
    Options,
    guarded,
)

if TYPE_CHECKING:
    from gpu_check.timing import Timed, Timer
    from gpu_check.workload import Sizes, Step

COMPACT_GOAL, SCORE_GOAL, SHARE_GOAL = 0.6, 0.5, 0.03
#: Layers that are compacted together: a tier, and all.
_TIERS = (6, 32)
_QUERIES = (16, 64, 256)


def run(options: Options) -> Iterator[Check]:
    """Only on a GPU: interpreted kernels say nothing about time."""
    need_gpu()
    need("torch", "triton")
    load_package()
    from gpu_check.timing import Timer, copy_bandwidth, matmul_rate
    from gpu_check.workload import Sizes

    timer = Timer(100 if options.quick else 500)
    copied, multiplied = copy_bandwidth(timer), matmul_rate(timer)
    peaks = {"copy_bytes_per_s": copied, "matmul_flop_per_s": multiplied}
    detail = f"{copied / 1e9:.0f} GB/s read and written"
    yield Check("copy bandwidth", MEASURED, detail, peaks)
    detail = f"{multiplied / 1e12:.0f} TFLOP/s, bf16, 8192 x 8192 x 8192"
    yield Check("matrix product", MEASURED, detail, peaks)
    for layout in ("NHD",) if options.quick else ("NHD", "HND"):
        for count in (1, 8):
            sizes = Sizes(num_requests=count, layout=layout)
            yield from _requests(sizes, timer, peaks, options)
    yield guarded("share of a prefill step", lambda: _share(timer, options))


def _lacks(num_bytes: float) -> str:
    """Why so much memory cannot be had; empty: it can."""
    import torch

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    needed = f"needs {num_bytes / 2**30:.0f} GiB of free GPU memory"
    return needed if free < num_bytes else ""


def _requests(
    sizes: Sizes, timer: Timer, peaks: dict[str, float], options: Options
) -> Iterator[Check]:
    """All that is measured of as many requests; their memory goes with the step."""
    from gpu_check.workload import Step

    label = f"{sizes.num_requests} x {sizes.num_tokens}, {sizes.layout}"
    if why := _lacks(1.5 * sizes.cache_bytes):
        yield Check(f"kernels, {label}", SKIPPED, why)
        return
    step = Step(sizes, "cuda", options.seed)
    every = slice(0, sizes.num_layers)
    step.pool(every)
    step.select(every)
    for layers in _TIERS:
        name = f"compact, {label}, {layers} layers"
        yield guarded(name, lambda n=name, x=layers: _compact(n, step, x, timer, peaks))
    for part in ("pool", "select"):
        name = f"{part}, {label}, {_TIERS[0]} layers"
        yield guarded(name, lambda n=name, p=part: _time_only(n, step, p, timer))
    for queries in _QUERIES:
        name = f"score, {label}, {queries} queries"
        other = step.with_queries(queries)
        yield guarded(name, lambda n=name, s=other: _score(n, s, timer, peaks))


def _figures(timed: Timed, **more: Any) -> dict[str, Any]:
    return {"launched_ms": timed.launched, "replayed_ms": timed.replayed} | more


def _compact(
    name: str, step: Step, layers: int, timer: Timer, peaks: dict[str, float]
) -> Check:
    timed = timer.time(lambda: step.compact(slice(0, layers)))
    num_bytes = step.sizes.moved_bytes(layers)
    rate = num_bytes / timed.best * 1e3
    share = rate / peaks["copy_bytes_per_s"]
    figures = _figures(
        timed,
        bytes=num_bytes,
        bytes_per_s=rate,
        share_of_copy=share,
        goal=COMPACT_GOAL,
    )
    detail = (
        f"{timed.best:.3f} ms (launched {timed.launched:.3f}), {rate / 1e9:.0f} GB/s, "
        f"{share:.0%} of a copy; goal: at least {COMPACT_GOAL:.0%}"
    )
    return Check(name, MET if share >= COMPACT_GOAL else MISSED, detail, figures)


def _time_only(name: str, step: Step, part: str, timer: Timer) -> Check:
    timed = timer.time(lambda: getattr(step, part)(slice(0, _TIERS[0])))
    detail = f"{timed.best:.3f} ms (launched {timed.launched:.3f})"
    return Check(name, MEASURED, detail, _figures(timed))


def regime(sizes: Sizes, layers: int, peaks: dict[str, float]) -> tuple[str, float]:
    """What bounds scoring from below, and the seconds that it takes at least."""
    memory = sizes.key_bytes(layers) / peaks["copy_bytes_per_s"]
    arithmetic = sizes.score_flop(layers) / peaks["matmul_flop_per_s"]
    if memory >= arithmetic:
        return "memory", memory
    return "arithmetic", arithmetic


def _score(name: str, step: Step, timer: Timer, peaks: dict[str, float]) -> Check:
    """Layer by layer; keys count once, though two passes read them."""
    sizes, layers = step.sizes, step.sizes.num_layers
    timed = timer.time(step.score_layers)
    seconds, copied = timed.best / 1e3, peaks["copy_bytes_per_s"]
    num_bytes, flops = sizes.key_bytes(layers), sizes.score_flop(layers) / seconds
    bound, least = regime(sizes, layers, peaks)
    rate = num_bytes / seconds
    share, possible = rate / copied, num_bytes / least / copied
    figures = _figures(
        timed,
        key_bytes=num_bytes,
        bytes_per_s=rate,
        flop_per_s=flops,
        share_of_copy=share,
        possible_share_of_copy=possible,
        bound=bound,
        share_of_bound=least / seconds,
        goal=SCORE_GOAL,
    )
    detail = (
        f"{timed.best:.3f} ms for {layers} layers (launched {timed.launched:.3f}), "
        f"{rate / 1e9:.0f} GB/s of keys, {share:.0%} of a copy; goal: at least "
        f"{SCORE_GOAL:.0%}; {flops / 1e12:.0f} TFLOP/s; bound by {bound}: "
        f"{possible:.0%} of a copy is possible, {least / seconds:.0%} of it reached"
    )
    return Check(name, MET if share >= SCORE_GOAL else MISSED, detail, figures)


def _share(timer: Timer, options: Options) -> Check:
    """Of one prompt: scoring, selection and compaction of all layers."""
    from gpu_check.workload import PrefillLayer, Sizes, Step

    sizes = Sizes()
    if why := _lacks(4 * 2**30):
        raise Skip(why)
    whole = timer.median_ms(PrefillLayer(sizes, "cuda").run) * sizes.num_layers
    timed = timer.time(Step(sizes, "cuda", options.seed).prefill)
    share = timed.best / whole
    figures = _figures(
        timed,
        prefill_ms=whole,
        share=share,
        launched_share=timed.launched / whole,
        goal=SHARE_GOAL,
        sizes={k: str(v) for k, v in asdict(sizes).items()},
    )
    detail = (
        f"{timed.best:.2f} ms of {whole:.1f} ms: {share:.1%} (launched one by one, "
        f"{timed.launched:.2f} ms: {timed.launched / whole:.1%}); goal: at most "
        f"{SHARE_GOAL:.0%}"
    )
    status = MET if share <= SHARE_GOAL else MISSED
    return Check("share of a prefill step", status, detail, figures)
