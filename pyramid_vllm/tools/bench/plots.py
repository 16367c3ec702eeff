"""Plots of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.figures import LATENCIES
from pyramid_vllm.tools.bench.report import PointReport
from pyramid_vllm.tools.figures import PERCENTILES, side_label
from pyramid_vllm.tools.plotting import new_figure


def save_plots(reports: Sequence[PointReport], folder: Path) -> list[Path]:
    """Draw the ratios over the sweep, and latencies point by point."""
    files = []
    for name, draw in (("ratio.png", draw_ratios), ("latency.png", _draw_latencies)):
        figure = new_figure()
        draw(figure, reports)
        figure.savefig(folder / name, dpi=150)
        files.append(folder / name)
    return files


def draw_ratios(figure: Any, reports: Sequence[PointReport]) -> None:
    """Over memory, a line for each policy; marks are hollow where memory does not
    bind."""
    figure.set_size_inches(7, 4.5)
    axes = figure.subplots()
    x = [report.point.kv_bytes / 2**20 for report in reports]
    for name in reports[0].policies:
        ratios = [report.ratio(name) or {} for report in reports]
        y = [ratio["median"] for ratio in ratios]
        line = axes.errorbar(x, y, yerr=_errors(ratios), capsize=3, label=name)
        color = line.lines[0].get_color()
        for report, at_x, at_y in zip(reports, x, y, strict=True):
            face = color if report.memory_binds else "white"
            axes.plot(at_x, at_y, "o", color=color, mfc=face, markersize=7)
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label=side_label(NONE))
    for label in sorted({report.binds_label for report in reports}):
        face = "gray" if label == "memory binds" else "white"
        axes.plot([], [], "o", color="gray", mfc=face, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{at:,.4g}" for at in x])
    axes.set(xlabel="KV memory, MiB", ylabel="tokens/s, ratio to stock vLLM")
    axes.set_ylim(bottom=0)
    axes.legend()


def _errors(spreads: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Distances from the median to the ends of the range."""
    return [
        [spread["median"] - spread["min"] for spread in spreads],
        [spread["max"] - spread["median"] for spread in spreads],
    ]


def _draw_latencies(figure: Any, reports: Sequence[PointReport]) -> None:
    """A row for each latency, a group of bars for each point."""
    sides = list(reports[0].sides)
    groups = [(report, p) for report in reports for p in PERCENTILES]
    figure.set_size_inches(max(7, 1.6 * len(groups)), 9)
    width = 0.8 / len(sides)
    for axes, (key, title) in zip(figure.subplots(3), LATENCIES.items(), strict=True):
        for index, name in enumerate(sides):
            found = [report.sides[name][f"{key}_p{p}_s"] for report, p in groups]
            left = (index + 0.5) * width - 0.4
            axes.bar(
                [group + left for group in range(len(groups))],
                [spread["median"] for spread in found],
                width,
                yerr=_errors(found),
                capsize=2,
                label=side_label(name),
            )
        ticks = [f"{report.point.label}\np{p}" for report, p in groups]
        axes.set_xticks(range(len(groups)), ticks)
        axes.set_title(f"{title}, s", loc="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(sides))
