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
    """Over memory, a line for each policy and rate; over rates where only they vary.

    Marks are hollow where memory does not bind.
    """
    figure.set_size_inches(7, 4.5)
    axes = figure.subplots()
    points = [report.point for report in reports]
    over_rates = (
        len({p.kv_bytes for p in points}) == 1 < len({p.request_rate for p in points})
    )

    def place(report: PointReport) -> float:
        point = report.point
        return point.request_rate or 0.0 if over_rates else point.kv_bytes / 2**20

    lines: dict[str, list[PointReport]] = {}
    for report in reports:
        rate = report.point.request_rate
        at_rate = "" if over_rates or rate is None else f", {rate:g} requests/s"
        lines.setdefault(at_rate, []).append(report)
    for at_rate, of_line in lines.items():
        x = [place(report) for report in of_line]
        for name in reports[0].policies:
            ratios = [report.ratio(name) or {} for report in of_line]
            y = [ratio["median"] for ratio in ratios]
            line = axes.errorbar(
                x, y, yerr=_errors(ratios), capsize=3, label=name + at_rate
            )
            color = line.lines[0].get_color()
            for report, at_x, at_y in zip(of_line, x, y, strict=True):
                face = color if report.memory_binds else "white"
                axes.plot(at_x, at_y, "o", color=color, mfc=face, markersize=7)
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label=side_label(NONE))
    for label in sorted({report.binds_label for report in reports}):
        face = "gray" if label == "memory binds" else "white"
        axes.plot([], [], "o", color="gray", mfc=face, label=label)
    places = sorted({place(report) for report in reports})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{at:,.4g}" for at in places])
    axes.set_xlabel("requests/s" if over_rates else "KV memory, MiB")
    axes.set_ylabel("tokens/s, ratio to stock vLLM")
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
