"""Plots of simulated runs: waiting, sequences at once, and what pages are used for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyramid_vllm.tools.figures import side_label
from pyramid_vllm.tools.plotting import new_figure
from pyramid_vllm.tools.simulate.run import SimulatedRun

_USES = ("running", "cached", "free")


def save_plots(runs: Sequence[SimulatedRun], folder: Path) -> Path:
    """Draw all sides into one picture; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = new_figure(figsize=(4 * (2 + len(runs)), 4))
    waits, running, *pages = figure.subplots(1, 2 + len(runs))
    for run, axes in zip(runs, pages, strict=True):
        label = side_label(run.policy)
        found = np.sort([r.first_token - r.arrival for r in run.requests.values()])
        waits.plot(found, np.arange(1, len(found) + 1) / len(found), label=label)
        ends = [step.end for step in run.steps]
        num_running = [step.num_running for step in run.steps]
        running.plot(ends, num_running, label=label, linewidth=1)
        at = [count.at for count in run.pages]
        shares = [[getattr(count, use) for count in run.pages] for use in _USES]
        axes.stackplot(at, shares, labels=_USES)
        axes.set(xlabel="s", ylabel="share of KV pages", title=label, ylim=(0, 1))
        axes.legend(loc="lower right")
    waits.set(xlabel="time to first token, s", ylabel="share of requests")
    running.set(xlabel="s", ylabel="sequences at once")
    for axes in (waits, running):
        axes.legend()
    file = folder / "simulate.png"
    figure.savefig(file, dpi=120)
    return file
