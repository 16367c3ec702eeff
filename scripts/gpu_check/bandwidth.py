"""Achieved bandwidth of the kernels, and the policy's share of a prefill step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_check.loading import Skip, is_interpreted, load_package, need, need_gpu
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
#: Layers that are compacted together: those of a tier, and all.
_TIERS = (6, 32)
_QUERIES = (16, 64, 256)


def run(options: Options) -> Iterator[Check]:
    """This runs on a GPU alone: interpreted kernels say nothing about time."""
    need_gpu()
    if is_interpreted():
        raise Skip("TRITON_INTERPRET=1: interpreted kernels say nothing about time")
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
    name = "share of a prefill step"
    yield guarded(name, lambda: _share(name, timer, options))


def _lacks(num_bytes: float) -> str:
    """The reason why so much memory cannot be had; empty if it can."""
    import torch

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    needed = f"needs {num_bytes / 2**30:.0f} GiB of free GPU memory"
    return needed if free < num_bytes else ""


def _requests(
    sizes: Sizes, timer: Timer, peaks: dict[str, float], options: Options
) -> Iterator[Check]:
    """All measurements of so many requests; their memory is freed with the step."""
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
        yield guarded(name, partial(_compact, name, step, layers, timer, peaks))
    for part in ("pool", "select"):
        name = f"{part}, {label}, {_TIERS[0]} layers"
        yield guarded(name, partial(_time_only, name, step, part, timer))
    for queries in _QUERIES:
        name = f"score, {label}, {queries} queries"
        other = step.with_queries(queries)
        yield guarded(name, partial(_score, name, other, timer, peaks))


def _check(name: str, status: str, detail: str, timed: Timed, **more: Any) -> Check:
    figures = {"launched_ms": timed.launched, "replayed_ms": timed.replayed} | more
    return Check(name, status, detail, figures)


def _compact(
    name: str, step: Step, layers: int, timer: Timer, peaks: dict[str, float]
) -> Check:
    timed = timer.time(lambda: step.compact(slice(0, layers)))
    num_bytes = step.sizes.moved_bytes(layers)
    rate = num_bytes / timed.best * 1e3
    share = rate / peaks["copy_bytes_per_s"]
    return _check(
        name,
        MET if share >= COMPACT_GOAL else MISSED,
        f"{timed}, {rate / 1e9:.0f} GB/s, {share:.0%} of a copy; goal: at least "
        f"{COMPACT_GOAL:.0%}",
        timed,
        bytes=num_bytes,
        bytes_per_s=rate,
        share_of_copy=share,
        goal=COMPACT_GOAL,
    )


def _time_only(name: str, step: Step, part: str, timer: Timer) -> Check:
    timed = timer.time(lambda: getattr(step, part)(slice(0, _TIERS[0])))
    return _check(name, MEASURED, str(timed), timed)


def regime(sizes: Sizes, layers: int, peaks: dict[str, float]) -> tuple[str, float]:
    """The lower bound of scoring's time: its kind and its seconds."""
    seconds = {
        "memory": sizes.key_bytes(layers) / peaks["copy_bytes_per_s"],
        "arithmetic": sizes.score_flop(layers) / peaks["matmul_flop_per_s"],
    }
    return max(seconds.items(), key=lambda item: item[1])


def _score(name: str, step: Step, timer: Timer, peaks: dict[str, float]) -> Check:
    """Score layer by layer. Keys count once, though two passes read them."""
    sizes, layers = step.sizes, step.sizes.num_layers
    timed = timer.time(step.score_layers)
    seconds, copied = timed.best / 1e3, peaks["copy_bytes_per_s"]
    num_bytes, flops = sizes.key_bytes(layers), sizes.score_flop(layers) / seconds
    bound, least = regime(sizes, layers, peaks)
    rate = num_bytes / seconds
    share, possible = rate / copied, num_bytes / least / copied
    return _check(
        name,
        MET if share >= SCORE_GOAL else MISSED,
        f"{timed}, {layers} layers, {rate / 1e9:.0f} GB/s of keys, {share:.0%} of a "
        f"copy; goal: at least {SCORE_GOAL:.0%}; {flops / 1e12:.0f} TFLOP/s; bound by "
        f"{bound}: {possible:.0%} of a copy is possible, {least / seconds:.0%} of it "
        "reached",
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


def _share(name: str, timer: Timer, options: Options) -> Check:
    """Scoring, selection and compaction of all layers for one prompt."""
    from gpu_check.workload import PrefillLayer, Sizes, Step

    sizes = Sizes()
    if why := _lacks(4 * 2**30):
        raise Skip(why)
    whole = timer.median_ms(PrefillLayer(sizes, "cuda").run) * sizes.num_layers
    timed = timer.time(Step(sizes, "cuda", options.seed).prefill)
    share = timed.best / whole
    return _check(
        name,
        MET if share <= SHARE_GOAL else MISSED,
        f"{timed.best:.2f} ms of {whole:.1f} ms: {share:.1%} (launched one by one, "
        f"{timed.launched:.2f} ms: {timed.launched / whole:.1%}); goal: at most "
        f"{SHARE_GOAL:.0%}",
        timed,
        prefill_ms=whole,
        share=share,
        launched_share=timed.launched / whole,
        goal=SHARE_GOAL,
        sizes={k: str(v) for k, v in asdict(sizes).items()},
    )
