"""``pyramid-vllm simulate``: from settings to tables, figures and plots."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pyramid_vllm.compat import check_vllm_version
from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.figures import (
    Figures,
    bars,
    right_table,
    side_label,
    side_table,
)
from pyramid_vllm.tools.plotting import check_matplotlib, new_figure
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.simulate.engine import SimulatedEngine
from pyramid_vllm.tools.simulate.figures import METRICS, run_figures
from pyramid_vllm.tools.simulate.loads import Load
from pyramid_vllm.tools.simulate.pages import PageCount
from pyramid_vllm.tools.simulate.run import Simulation
from pyramid_vllm.tools.simulate.settings import SimulateSettings
from pyramid_vllm.tools.simulate.slo import Capacity, find_capacity
from pyramid_vllm.tools.sizes import format_bytes


def run_simulation(settings: SimulateSettings) -> None:
    """Simulate all sides, print the tables, write what is asked for.

    Raises:
        ValueError: an option is not valid, or something does not fit; names it.
        RuntimeError: a request was not served, or matplotlib is missing.
    """
    # On import, vLLM warns about this machine, which is not the simulated device.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if settings.plots is not None:
        check_matplotlib()
    if settings.calibrate is not None:
        from pyramid_vllm.tools.simulate.calibrate import run_calibration

        run_calibration(settings.model, settings.gpu, settings.calibrate)
        return
    check_vllm_version()
    # All options are checked before anything is printed.
    sides, load, objective = settings.sides, settings.traffic, settings.objective
    heading = _heading(settings)
    console = Console()
    console.print(heading, highlight=False)
    engines = [
        (side.name, SimulatedEngine(settings.engine, side.policy)) for side in sides
    ]
    runs = [_run(console, settings, engine, load) for engine in engines]
    figures = {run.name: run_figures(run) for run in runs}
    console.print(figures_table(figures))
    report: list[dict[str, Any]]
    report = [{"policy": name, **of_side} for name, of_side in figures.items()]
    if objective:
        capacities = {
            engine[0]: _capacity(console, settings, objective, engine)
            for engine in engines
        }
        console.print(_capacity_table(settings, objective, capacities))
        for run in report:
            run["capacity"] = vars(capacities[run["policy"]])
    if settings.json_file is not None:
        content = {"runs": report, "settings": settings.describe()}
        write_report(settings.json_file, content, settings.seed)
    if settings.plots is not None:
        console.print(f"written: {save_plots(runs, settings.plots)}")


def _run(
    console: Console,
    settings: SimulateSettings,
    engine: tuple[str, SimulatedEngine],
    load: Load,
) -> Simulation:
    """Run a side under a load."""
    label = side_label(engine[0])
    if load.rate:
        label += f", {load.rate:.3g} sessions/s"
    with bars(console, 36, transient=True) as progress:
        bar = progress.add_task(label, total=load.num_requests)
        return Simulation(
            *engine,
            settings.device,
            load,
            settings.cpu_time,
            settings.cascade,
            progress=lambda done: progress.update(bar, completed=done),
        ).run()


def _capacity(
    console: Console,
    settings: SimulateSettings,
    objective: Figures,
    engine: tuple[str, SimulatedEngine],
) -> Capacity:
    return find_capacity(
        settings.traffic,
        objective,
        lambda load: run_figures(_run(console, settings, engine, load)),
    )


def _heading(settings: SimulateSettings) -> str:
    engine, load = settings.engine, settings.traffic
    model = engine.model
    arrivals = f"{load.rate:.3g} sessions/s" if load.rate else "all at once"
    if load.num_clients is not None:
        arrivals = f"{load.num_clients} clients that wait for answers"
    count = f"{model.tensor_parallel} x " if model.tensor_parallel > 1 else ""
    return (
        f"{model.name} in {model.dtype} on {count}{settings.device.name} (modelled), "
        f"{format_bytes(engine.kv_bytes)} of KV memory a device, prefix caching "
        f"{'on' if engine.prefix_caching else 'off'}; load {load.name}: "
        f"{load.num_requests:,} requests, {arrivals}; scheduler's CPU time "
        f"{'counts' if settings.cpu_time else 'left out'}"
    )


def figures_table(sides: dict[str, Figures]) -> Table:
    """All figures; of a policy also its ratio to stock."""

    def ratio(name: str, key: str) -> str:
        stock = sides[NONE][key]
        return f"{sides[name][key] / stock:.2f}" if stock else "-"

    return side_table(METRICS, sides, ratio)


def _capacity_table(
    settings: SimulateSettings, objective: Figures, capacities: dict[str, Capacity]
) -> Table:
    names = {"ttft_p99_s": "time to first token", "tpot_p99_s": "time per output token"}
    bounds = [f"{names[key]} p99 up to {bound:g} s" for key, bound in objective.items()]
    table = right_table(
        ("", "requests/s an engine", "of the load's rate", "devices"),
        f"Highest rate with {' and '.join(bounds)}",
    )
    for name, capacity in capacities.items():
        num = capacity.num_engines
        devices = f"{num * settings.tensor_parallel}" if num else "no number"
        rates = f"{capacity.rate:.3g}", f"{capacity.speed:.3g}"
        table.add_row(side_label(name), *rates, devices)
    return table


def save_plots(runs: Sequence[Simulation], folder: Path) -> Path:
    """Draw all sides into one picture; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = new_figure(figsize=(4 * (2 + len(runs)), 4))
    waits, running, *pages = figure.subplots(1, 2 + len(runs))
    for run, axes in zip(runs, pages, strict=True):
        label = side_label(run.name)
        found = np.sort([r.first_token - r.arrival for r in run.requests.values()])
        waits.plot(found, np.arange(1, len(found) + 1) / len(found), label=label)
        ends = [step.end for step in run.steps]
        num_running = [step.num_running for step in run.steps]
        running.plot(ends, num_running, label=label, linewidth=1)
        at, *shares = zip(*run.pages, strict=True)
        axes.stackplot(at, shares, labels=PageCount._fields[1:])
        axes.set(xlabel="s", ylabel="share of KV pages", title=label, ylim=(0, 1))
        axes.legend(loc="lower right")
    waits.set(xlabel="time to first token, s", ylabel="share of requests")
    running.set(xlabel="s", ylabel="sequences at once")
    for axes in (waits, running):
        axes.legend()
    file = folder / "simulate.png"
    figure.savefig(file, dpi=120)
    return file
