"""``pyramid-vllm bench``: from checked options to tables and figures."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from pyramid_vllm import __version__
from pyramid_vllm.compat import check_vllm_version, installed_vllm_version
from pyramid_vllm.tools.bench.figures import batch_figures, check_activation
from pyramid_vllm.tools.bench.measure import MeasureTask, measure
from pyramid_vllm.tools.bench.report import (
    make_reports,
    medians,
    point_table,
    sweep_table,
)
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.bench.workload import Point, Workload, make_workload
from pyramid_vllm.tools.figures import bars
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.sides import Side, should_evict
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
    task: MeasureTask

    @property
    def labels(self) -> dict[str, Any]:
        """Labels for people who open a file."""
        point = asdict(self.point)
        return {"point": point, "side": self.side.name, "repeat": self.repeat}

    @property
    def identity(self) -> dict[str, Any]:
        """All that its result depends on."""
        return {
            "task": asdict(self.task),
            "repeat": self.repeat,
            "vllm": installed_vllm_version(),
            "pyramid_vllm": __version__,
        }


def run_bench(settings: BenchSettings) -> None:
    """Run what is not finished yet, and report all of it.

    Raises:
        ValueError: an option is not valid.
        RuntimeError: a run failed, or a policy did not act.
    """
    check_vllm_version()
    workload = make_workload(settings)
    points = workload.points()
    settings.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(_announcement(workload, points), markup=False)
    results = execute(console, workload, plan_runs(workload, points))
    reports = make_reports(workload, points, results)
    for report in reports:
        console.print(point_table(report))
    if len(reports) > 1:
        console.print(sweep_table(reports))
    content = {
        "settings": settings.describe(),
        "prompts": workload.requests.source,
        "sharing": settings.sharing,
        "points": reports,
        "runs": results,
    }
    files = [settings.out / "results.json"]
    write_report(files[0], content, settings.seed)
    if settings.json_file is not None:
        write_report(settings.json_file, medians(settings, reports), settings.seed)
        files.append(settings.json_file)
    console.print(f"written: {', '.join(map(str, files))}")


def _announcement(workload: Workload, points: list[Point]) -> str:
    settings = workload.settings
    memories = ", ".join(f"{p.label} ({format_bytes(p.kv_bytes)})" for p in points)
    # A policy may switch it off; the tables show the state of each side.
    is_off = settings.engine_args.get("enable_prefix_caching") is False
    return (
        f"{settings.num_prompts} prompts "
        f"({workload.requests.source}; {settings.sharing}), prefix caching "
        f"{'off' if is_off else 'on'}, KV memory {memories}, "
        f"{settings.repeats} repeats of {', '.join(s.name for s in settings.sides)}"
    )


def plan_runs(workload: Workload, points: list[Point]) -> list[Run]:
    """All runs, sides in turns."""
    settings, requests = workload.settings, workload.requests

    def task(point: Point, side: Side) -> MeasureTask:
        of_run = {
            "kv_cache_memory_bytes": point.kv_bytes,
            "kv_policy": side.policy_json,
        }
        return MeasureTask(
            model=str(settings.model),
            turns=requests.turns,
            output_lengths=requests.output_lengths,
            engine_args=workload.engine_args | of_run,
            warm_up=True,
        )

    return [
        Run(point, side, repeat, task(point, side))
        for point in points
        for repeat in range(settings.repeats)
        for side in settings.sides
    ]


def execute(console: Console, workload: Workload, runs: list[Run]) -> list[Result]:
    """The results of all runs; those that the folder has are not repeated."""
    folder = workload.settings.out
    store = Store(folder / "runs")
    results = [store.load(run.identity) for run in runs]
    num_finished = len(runs) - results.count(None)
    if num_finished:
        whole_of = f"{num_finished} of {len(runs)} runs"
        console.print(f"{whole_of} are finished in {folder}: skipped")
    with bars(console, 44) as progress:
        whole = progress.add_task("runs", total=len(runs), completed=num_finished)
        for index, run in enumerate(runs):
            if results[index] is not None:
                continue
            label = f"{run.point.label}, repeat {run.repeat + 1}: {run.side.name}"
            total = len(run.task.output_lengths)
            bar = progress.add_task(f"{label}, loading", total=total)

            def advance(done: int, bar: Any = bar, label: str = label) -> None:
                progress.update(bar, completed=done, description=label)

            results[index] = result = run_task(run.task, advance)
            progress.remove_task(bar)
            if should_evict(workload.rule(run.side), run.task.prompt_lengths):
                check_activation(run.side.name, result["figures"])
            store.save(run.identity, run.labels | result)
            progress.advance(whole)
    # A run that finished under another label gets this run's labels.
    return [
        (result or {}) | run.labels for run, result in zip(runs, results, strict=True)
    ]


def run_task(task: MeasureTask, advance: Callable[[int], None]) -> Result:
    """Measure one side; ``advance`` gets the number of finished requests."""
    measured = measure(task, advance)
    raw = {
        "prefix_caching": measured.prefix_caching,
        "prompt_lengths": task.prompt_lengths,
        "output_lengths": task.output_lengths,
        "first_token_s": measured.first_token_s,
        "finish_s": measured.finish_s,
    }
    return {"figures": batch_figures(task, measured), "raw": raw}
