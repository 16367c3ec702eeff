"""Plots of simulated runs: waiting, sequences at once, and what pages are used for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyramid_vllm.tools.figures import side_label
from pyramid_vllm.tools.plotting import new_figure
from pyramid_vllm.tools.simulate.run import SimulatedRun

_USES = ("running", "cached", "free")


def save_plots(runs: Sequence[SimulatedRun], folder: Path) -> Path:
    """Draw all sides into one picture.

    Args:
        runs: of all sides.
        folder: is made if it is not there.

    Returns:
        The picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure = new_figure()
    figure.set_size_inches(4 * (2 + len(runs)), 4)
    axes = figure.subplots(1, 2 + len(runs))
    _draw_first_tokens(axes[0], runs)
    _draw_running(axes[1], runs)
    for of_run, run in zip(axes[2:], runs, strict=True):
        _draw_pages(of_run, run)
    file = folder / "simulate.png"
    figure.savefig(file, dpi=120)
    return file


def _draw_first_tokens(axes: Any, runs: Sequence[SimulatedRun]) -> None:
    for run in runs:
        waits = np.sort([r.first_token - r.arrival for r in run.requests.values()])
        axes.plot(
            waits,
            np.arange(1, len(waits) + 1) / len(waits),
            label=side_label(run.policy),
        )
    axes.set_xlabel("time to first token, s")
    axes.set_ylabel("share of requests")
    axes.legend()


def _draw_running(axes: Any, runs: Sequence[SimulatedRun]) -> None:
    for run in runs:
        axes.plot(
            [step.end for step in run.steps],
            [step.num_running for step in run.steps],
            label=side_label(run.policy),
            linewidth=1,
        )
    axes.set_xlabel("s")
    axes.set_ylabel("sequences at once")
    axes.legend()


def _draw_pages(axes: Any, run: SimulatedRun) -> None:
    at = [count.at for count in run.pages]
    shares = [[getattr(count, use) for count in run.pages] for use in _USES]
    axes.stackplot(at, shares, labels=_USES)
    axes.set_ylim(0, 1)
    axes.set_xlabel("s")
    axes.set_ylabel("share of KV pages")
    axes.set_title(side_label(run.policy))
    axes.legend(loc="lower right")
