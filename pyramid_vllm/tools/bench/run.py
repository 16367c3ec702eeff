"""``pyramid-vllm bench``: from checked options to tables, figures and plots."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pyramid_vllm.compat import check_vllm_version
from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.export import save_medians
from pyramid_vllm.tools.bench.figures import check_activation
from pyramid_vllm.tools.bench.measure import MeasureTask
from pyramid_vllm.tools.bench.offline import offline_task, run_offline
from pyramid_vllm.tools.bench.online import (
    OnlineTask,
    check_online,
    online_task,
    run_online,
)
from pyramid_vllm.tools.bench.plots import save_plots
from pyramid_vllm.tools.bench.report import PointReport, point_table, sweep_table
from pyramid_vllm.tools.bench.settings import BenchSettings, Side
from pyramid_vllm.tools.bench.store import PREFIX_CACHING, RunResult, RunStore, run_key
from pyramid_vllm.tools.bench.summary import memory_binds, summarize
from pyramid_vllm.tools.bench.workload import Point, Workload, make_workload
from pyramid_vllm.tools.plotting import check_matplotlib
from pyramid_vllm.tools.provenance import provenance
from pyramid_vllm.tools.sizes import format_bytes


@dataclass(frozen=True)
class Run:
    """One side, once, at one point."""

    point: Point
    side: Side
    repeat: int
    task: MeasureTask | OnlineTask

    @property
    def labels(self) -> dict[str, Any]:
        """What it is, for people."""
        point = asdict(self.point)
        return {"point": point, "side": self.side.name, "repeat": self.repeat}


def run_bench(settings: BenchSettings) -> None:
    """Run what is not finished yet, and report all of it.

    Raises:
        ValueError: an option is not valid.
        RuntimeError: a run failed, a policy did not act, or matplotlib is missing.
    """
    check_matplotlib()
    check_vllm_version()
    if settings.workload == "online":
        check_online(settings)
    workload = make_workload(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    _announce(console, settings, workload)
    runs = plan_runs(settings, workload)
    results = _execute(console, settings, workload, runs)
    reports = make_reports(settings, workload, runs, results)
    for report in reports:
        console.print(point_table(report))
    if len(reports) > 1:
        console.print(sweep_table(reports))
    file = settings.out / "results.json"
    content = _content(settings, workload, runs, results, reports)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    pictures = save_plots(reports, settings.out)
    files = [file, *pictures]
    if settings.json_file is not None:
        save_medians(settings, reports, settings.json_file)
        files.append(settings.json_file)
    console.print(f"written: {', '.join(map(str, files))}")


def _announce(console: Console, settings: BenchSettings, workload: Workload) -> None:
    memories = ", ".join(
        f"{p.label} ({format_bytes(p.kv_bytes)})" for p in workload.points
    )
    console.print(
        f"{settings.workload}: {settings.num_prompts} prompts "
        f"({workload.requests.source}; {settings.sharing}), "
        f"prefix caching {_asked_caching(settings)}, KV memory {memories}, "
        f"{settings.repeats} repeats of {', '.join(s.name for s in settings.sides)}",
        markup=False,
    )


def _asked_caching(settings: BenchSettings) -> str:
    """A policy may switch it off; the tables say what each side had."""
    asked = settings.engine_args.get("enable_prefix_caching")
    return "off" if asked is False else "on"


def plan_runs(settings: BenchSettings, workload: Workload) -> list[Run]:
    """All runs, sides in turns."""
    make: Callable[..., MeasureTask | OnlineTask] = (
        online_task if settings.workload == "online" else offline_task
    )
    tasks = {
        (point, side.name): make(settings, workload, point, side)
        for point in workload.points
        for side in settings.sides
    }
    return [
        Run(point, side, repeat, tasks[point, side.name])
        for point in workload.points
        for repeat in range(settings.repeats)
        for side in settings.sides
    ]


def _execute(
    console: Console, settings: BenchSettings, workload: Workload, runs: list[Run]
) -> list[RunResult]:
    store = RunStore(settings.out / "runs")
    keys = [run_key(run.task, run.repeat) for run in runs]
    num_finished = sum(map(store.has, keys))
    if num_finished:
        whole_of = f"{num_finished} of {len(runs)} runs"
        console.print(f"{whole_of} are finished in {settings.out}: skipped")
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("runs", total=len(runs), completed=num_finished)
        for run, key in zip(runs, keys, strict=True):
            if not store.has(key):
                result = _run(run, settings.num_requests, progress)
                if workload.should_evict(run.side):
                    check_activation(run.side.name, result.figures)
                store.save(key, run.labels, result)
                progress.advance(whole)
    return [store.load(key) for key in keys]


def _run(run: Run, num_requests: int, progress: Progress) -> RunResult:
    label = f"{run.point.label}, repeat {run.repeat + 1}: {run.side.name}"
    bar = progress.add_task(f"{label}, loading", total=num_requests)

    def advance(done: int) -> None:
        progress.update(bar, completed=min(done, num_requests), description=label)

    try:
        if isinstance(run.task, MeasureTask):
            return run_offline(run.task, advance)
        return run_online(run.task, advance)
    finally:
        progress.remove_task(bar)


def make_reports(
    settings: BenchSettings,
    workload: Workload,
    runs: list[Run],
    results: list[RunResult],
) -> list[PointReport]:
    """What is reported of each point."""
    reports = []
    num_at_once = min(settings.num_prompts, settings.max_num_seqs)
    for point in workload.points:
        found: dict[str, list[RunResult]] = {side.name: [] for side in settings.sides}
        for run, result in zip(runs, results, strict=True):
            if run.point == point:
                found[run.side.name].append(result)
        sides = {name: [run.figures for run in runs] for name, runs in found.items()}
        caching = {name: runs[0].raw[PREFIX_CACHING] for name, runs in found.items()}
        fits = workload.stock_fits(point.kv_bytes, num_at_once)
        binds = memory_binds(fits, num_at_once, sides[NONE])
        summary = summarize(sides)
        report = PointReport(point, binds, summary, caching, settings.sharing)
        reports.append(report)
    return reports


def _content(
    settings: BenchSettings,
    workload: Workload,
    runs: list[Run],
    results: list[RunResult],
    reports: list[PointReport],
) -> dict[str, Any]:
    return {
        "settings": settings.describe(),
        "prompts": workload.requests.source,
        "sharing": settings.sharing,
        "points": [report.as_json() for report in reports],
        "runs": [
            run.labels | asdict(result)
            for run, result in zip(runs, results, strict=True)
        ],
    } | provenance(settings.seed)
