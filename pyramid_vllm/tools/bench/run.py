"""``pyramid-vllm bench``: from checked options to tables, figures and plots."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console

from pyramid_vllm import __version__
from pyramid_vllm.compat import check_vllm_version, installed_vllm_version
from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.figures import (
    check_activation,
    memory_binds,
    offline_figures,
    summarize,
)
from pyramid_vllm.tools.bench.measure import MeasureTask, measure
from pyramid_vllm.tools.bench.online import OnlineTask, online_task, run_online
from pyramid_vllm.tools.bench.plots import save_plots
from pyramid_vllm.tools.bench.report import (
    PointReport,
    medians,
    point_table,
    sweep_table,
)
from pyramid_vllm.tools.bench.server import vllm_script
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.bench.workload import (
    Point,
    Workload,
    engine_args,
    make_workload,
)
from pyramid_vllm.tools.figures import Figures, bars
from pyramid_vllm.tools.plotting import check_matplotlib
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.sides import Side
from pyramid_vllm.tools.sizes import format_bytes
from pyramid_vllm.tools.store import Store

#: A finished run: its figures, and raw ones, some of them for each request.
Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One side, once, at one point."""

    point: Point
    side: Side
    repeat: int
    task: MeasureTask | OnlineTask

    @property
    def labels(self) -> dict[str, Any]:
        """Labels for people who open a file."""
        point = asdict(self.point)
        return {"point": point, "side": self.side.name, "repeat": self.repeat}

    @property
    def identity(self) -> dict[str, Any]:
        """All that its result depends on."""
        return {
            "kind": type(self.task).__name__,
            "task": asdict(self.task),
            "repeat": self.repeat,
            "vllm": installed_vllm_version(),
            "pyramid_vllm": __version__,
        }


def run_bench(settings: BenchSettings) -> None:
    """Run what is not finished yet, and report all of it.

    Raises:
        ValueError: an option is not valid.
        RuntimeError: a run failed, a policy did not act, or matplotlib is missing.
    """
    check_matplotlib()
    check_vllm_version()
    if settings.is_online:
        vllm_script()
    workload = make_workload(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(_announcement(settings, workload), markup=False)
    runs = plan_runs(settings, workload)
    results = _execute(console, settings, workload, runs)
    reports = make_reports(settings, workload, results)
    for report in reports:
        console.print(point_table(report))
    if len(reports) > 1:
        console.print(sweep_table(reports))
    content = {
        "settings": settings.describe(),
        "prompts": workload.requests.source,
        "sharing": settings.sharing,
        "points": [report.as_json() for report in reports],
        "runs": results,
    }
    files = [settings.out / "results.json"]
    write_report(files[0], content, settings.seed)
    files += save_plots(reports, settings.out)
    if settings.json_file is not None:
        write_report(settings.json_file, medians(settings, reports), settings.seed)
        files.append(settings.json_file)
    console.print(f"written: {', '.join(map(str, files))}")


def _announcement(settings: BenchSettings, workload: Workload) -> str:
    memories = ", ".join(
        f"{p.label} ({format_bytes(p.kv_bytes)})" for p in workload.points
    )
    # A policy may switch it off; the tables show the state of each side.
    is_off = settings.engine.get("enable_prefix_caching") is False
    return (
        f"{settings.workload}: {settings.num_prompts} prompts "
        f"({workload.requests.source}; {settings.sharing}), prefix caching "
        f"{'off' if is_off else 'on'}, KV memory {memories}, "
        f"{settings.repeats} repeats of {', '.join(s.name for s in settings.sides)}"
    )


def offline_task(
    settings: BenchSettings, workload: Workload, point: Point, side: Side
) -> MeasureTask:
    """The task of one run."""
    skip = {} if workload.has_tokenizer else {"skip_tokenizer_init": True}
    return MeasureTask(
        model=str(settings.model),
        turns=workload.requests.turns,
        output_lengths=workload.requests.output_lengths,
        engine_args=skip | engine_args(settings, workload, point, side),
        warm_up=True,
    )


def plan_runs(settings: BenchSettings, workload: Workload) -> list[Run]:
    """All runs, sides in turns."""
    make: Callable[..., MeasureTask | OnlineTask] = (
        online_task if settings.is_online else offline_task
    )
    runs = []
    for point in workload.points:
        tasks = [make(settings, workload, point, side) for side in settings.sides]
        runs += [
            Run(point, side, repeat, task)
            for repeat in range(settings.repeats)
            for side, task in zip(settings.sides, tasks, strict=True)
        ]
    return runs


def _execute(
    console: Console, settings: BenchSettings, workload: Workload, runs: list[Run]
) -> list[Result]:
    """The results of all runs; those that the folder has are not repeated."""
    store = Store(settings.out / "runs")
    results = [store.load(run.identity) for run in runs]
    num_finished = len(runs) - results.count(None)
    if num_finished:
        whole_of = f"{num_finished} of {len(runs)} runs"
        console.print(f"{whole_of} are finished in {settings.out}: skipped")
    with bars(console, 44) as progress:
        whole = progress.add_task("runs", total=len(runs), completed=num_finished)
        for index, run in enumerate(runs):
            if results[index] is not None:
                continue
            label = f"{run.point.label}, repeat {run.repeat + 1}: {run.side.name}"
            total = settings.num_requests
            bar = progress.add_task(f"{label}, loading", total=total)
            figures, raw = _run(
                run.task, partial(progress.update, bar, description=label)
            )
            progress.remove_task(bar)
            if workload.should_evict(run.side):
                check_activation(run.side.name, figures)
            results[index] = result = {"figures": figures, "raw": raw}
            store.save(run.identity, run.labels | result)
            progress.advance(whole)
    # A run that finished under another label gets this run's labels.
    return [
        (result or {}) | run.labels for run, result in zip(runs, results, strict=True)
    ]


def _run(
    task: MeasureTask | OnlineTask, update: Callable[..., None]
) -> tuple[Figures, dict[str, Any]]:
    def advance(done: int) -> None:
        update(completed=done)

    if isinstance(task, OnlineTask):
        return run_online(task, advance)
    measured = measure(task, advance)
    raw = {
        "prefix_caching": measured.prefix_caching,
        "prompt_lengths": task.prompt_lengths,
        "output_lengths": task.output_lengths,
        "first_token_s": measured.first_token_s,
        "finish_s": measured.finish_s,
    }
    return offline_figures(task, measured), raw


def make_reports(
    settings: BenchSettings, workload: Workload, results: list[Result]
) -> list[PointReport]:
    """The reports of all points."""
    reports = []
    num_at_once = min(settings.num_prompts, settings.max_num_seqs)
    for point in workload.points:
        sides: dict[str, list[Figures]] = {}
        caching: dict[str, bool] = {}
        for result in results:
            if result["point"] == asdict(point):
                sides.setdefault(result["side"], []).append(result["figures"])
                caching[result["side"]] = result["raw"]["prefix_caching"]
        fits = workload.stock_fits(point.kv_bytes, num_at_once)
        binds = memory_binds(fits, num_at_once, sides[NONE])
        summary = summarize(sides)
        reports.append(PointReport(point, binds, summary, caching, settings.sharing))
    return reports
