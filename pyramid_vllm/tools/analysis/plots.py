"""Plots of what an analysis found."""

from pathlib import Path

import numpy as np

from pyramid_vllm.tools.analysis.found import Found
from pyramid_vllm.tools.plotting import new_figure


def plot_costs(found: Found, path: Path) -> None:
    """ICR: what cutting one layer alone costs, by layer, a line a ratio."""
    figure = new_figure(figsize=(8, 6))
    for axes, column, label in zip(
        figure.subplots(2, 1, sharex=True),
        (0, 1),
        ("loss, nats a token", "KL to the full cache, nats"),
        strict=True,
    ):
        means = found.costs[..., column]
        for ratio, layers in zip(found.settings.ratios, means, strict=True):
            axes.plot(layers, marker=".", label=f"{ratio:.0%} kept")
        axes.set_ylabel(label)
        axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_xlabel("the layer whose context is cut")
    axes.legend()
    figure.suptitle("Inference context redundancy")
    figure.savefig(path)


def plot_overlaps(found: Found, path: Path) -> None:
    """RAC: overlap of crucial tokens by layer and distance."""
    figure = new_figure(figsize=(8, 4))
    axes = figure.subplots()
    for distance, layers in zip(
        found.settings.distances, np.mean(found.overlaps, axis=0), strict=True
    ):
        axes.plot(layers, marker=".", label=f"{distance} tokens earlier")
    axes.set_xlabel("layer")
    axes.set_ylabel("overlap with the newest window's choice")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.suptitle("Recent attention consistency")
    figure.savefig(path)
