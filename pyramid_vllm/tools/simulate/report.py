"""From settings to tables, figures and plots."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.figures import Figures, side_label
from pyramid_vllm.tools.provenance import provenance
from pyramid_vllm.tools.simulate.engine import SimulatedEngine
from pyramid_vllm.tools.simulate.figures import METRICS, run_figures
from pyramid_vllm.tools.simulate.loads import Load
from pyramid_vllm.tools.simulate.run import SimulatedRun, simulate
from pyramid_vllm.tools.simulate.settings import SimulateSettings
from pyramid_vllm.tools.simulate.slo import Capacity, find_capacity
from pyramid_vllm.tools.sizes import format_bytes


def run_simulation(
    settings: SimulateSettings, json_file: Path | None, plots: Path | None
) -> None:
    """Simulate all sides, print the tables, write what is asked for.

    Raises:
        ValueError: something does not fit; names it.
        RuntimeError: a request was not served, or matplotlib is missing.
    """
    console = Console()
    console.print(_heading(settings), highlight=False)
    engines = {
        name: SimulatedEngine(settings.engine, policy)
        for name, policy in settings.sides
    }
    runs = [
        _simulated(console, settings, name, engine, settings.load)
        for name, engine in engines.items()
    ]
    figures = {run.policy: run_figures(run) for run in runs}
    console.print(figures_table(figures))
    capacities = _capacities(console, settings, engines)
    if capacities:
        console.print(_capacity_table(settings, capacities))
    if json_file is not None:
        content = _content(settings, figures, capacities)
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if plots is not None:
        from pyramid_vllm.tools.simulate.plots import save_plots

        console.print(f"written: {save_plots(runs, plots)}")


def _heading(settings: SimulateSettings) -> str:
    engine, load, device = settings.engine, settings.load, settings.device
    model = engine.model
    arrivals = "all at once"
    if load.num_clients is not None:
        arrivals = f"{load.num_clients} clients that wait for answers"
    elif load.rate:
        arrivals = f"{load.rate:.3g} sessions/s"
    count = f"{model.tensor_parallel} x " if model.tensor_parallel > 1 else ""
    return (
        f"{model.name} in {model.dtype} on {count}{device.name} (modelled), "
        f"{format_bytes(engine.kv_bytes)} of KV memory a device, prefix caching "
        f"{'on' if engine.prefix_caching else 'off'}; load {load.name}: "
        f"{load.num_requests:,} requests, {arrivals}; scheduler's CPU time "
        f"{'counts' if settings.options.cpu_time else 'left out'}"
    )


def _simulated(
    console: Console,
    settings: SimulateSettings,
    name: str,
    engine: SimulatedEngine,
    load: Load,
    note: str = "",
) -> SimulatedRun:
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn())
    label = side_label(name) + note
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(label, total=load.num_requests)
        return simulate(
            name,
            engine,
            settings.device,
            load,
            settings.options,
            lambda done: progress.update(bar, completed=done),
        )


def _capacities(
    console: Console, settings: SimulateSettings, engines: dict[str, SimulatedEngine]
) -> dict[str, Capacity]:
    objective = settings.objective
    if objective is None:
        return {}

    def capacity(name: str, engine: SimulatedEngine) -> Capacity:
        def figures(load: Load) -> Figures:
            note = f", {load.rate:.3g} sessions/s"
            run = _simulated(console, settings, name, engine, load, note)
            return run_figures(run)

        return find_capacity(settings.load, objective, figures)

    return {name: capacity(name, engine) for name, engine in engines.items()}


def figures_table(sides: dict[str, Figures]) -> Table:
    """All figures; of a policy also its ratio to stock."""
    table = Table()
    table.add_column("")
    for name in sides:
        table.add_column(side_label(name), justify="right")
        if name != NONE:
            table.add_column("to stock", justify="right")
    stock = sides[NONE]
    for metric in METRICS:
        cells = []
        for name, figures in sides.items():
            cells.append(f"{figures[metric.key] * metric.factor:{metric.format}}")
            if name != NONE:
                theirs = stock[metric.key]
                cells.append(f"{figures[metric.key] / theirs:.2f}" if theirs else "-")
        table.add_row(metric.label, *cells)
    return table


def _capacity_table(
    settings: SimulateSettings, capacities: dict[str, Capacity]
) -> Table:
    objective = settings.objective
    assert objective is not None
    bounds = [
        f"{label} p99 up to {bound:g} s"
        for label, bound in (
            ("time to first token", objective.ttft_s),
            ("time per output token", objective.tpot_s),
        )
        if bound is not None
    ]
    table = Table(title=f"Highest rate with {' and '.join(bounds)}")
    for column in ("", "requests/s an engine", "of the load's rate", "devices"):
        table.add_column(column, justify="right")
    for name, capacity in capacities.items():
        num = capacity.num_engines
        devices = num and num * settings.engine.model.tensor_parallel
        table.add_row(
            side_label(name),
            f"{capacity.rate:.3g}",
            f"{capacity.speed:.3g}",
            "no number" if devices is None else f"{devices}",
        )
    return table


def _content(
    settings: SimulateSettings,
    figures: dict[str, Figures],
    capacities: dict[str, Capacity],
) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    for name, of_side in figures.items():
        run: dict[str, Any] = {"policy": name, **of_side}
        if name in capacities:
            run["capacity"] = vars(capacities[name])
        runs.append(run)
    return {"runs": runs, "settings": settings.describe()} | provenance(settings.seed)
