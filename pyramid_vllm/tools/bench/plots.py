"""Plots of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.figures import PERCENTILES, side_label
from pyramid_vllm.tools.bench.report import PointReport
from pyramid_vllm.tools.plotting import new_figure

_LATENCIES = (
    ("ttft", "time to first token, s"),
    ("tpot", "time per output token, s"),
    ("e2e", "end to end, s"),
)


def save_plots(reports: Sequence[PointReport], folder: Path) -> list[Path]:
    """Draw the ratios over the sweep, and latencies point by point."""
    pictures = {"ratio.png": draw_ratios, "latency.png": _draw_latencies}
    files = []
    for name, draw in pictures.items():
        figure = new_figure()
        draw(figure, reports)
        figure.savefig(folder / name, dpi=150)
        files.append(folder / name)
    return files


def draw_ratios(figure: Any, reports: Sequence[PointReport]) -> None:
    """Over memory, a line for each policy and rate; over rates where only they vary."""
    figure.set_size_inches(7, 4.5)
    axes = figure.subplots()
    rates = {report.point.request_rate for report in reports}
    memories = {report.point.kv_bytes for report in reports}
    over_rates = len(memories) == 1 and len(rates) > 1
    lines: dict[str, list[PointReport]] = {}
    for report in reports:
        rate = report.point.request_rate
        at_rate = "" if over_rates or rate is None else f", {rate:g} requests/s"
        lines.setdefault(at_rate, []).append(report)
    for at_rate, of_line in lines.items():
        x = [_place(report, over_rates) for report in of_line]
        for name in reports[0].policies:
            _draw_line(axes, x, of_line, name, name + at_rate)
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label=side_label(NONE))
    _explain_marks(axes, reports)
    places = sorted({_place(report, over_rates) for report in reports})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,.4g}" for place in places])
    axes.set_xlabel("requests/s" if over_rates else "KV memory, MiB")
    axes.set_ylabel("tokens/s, ratio to stock vLLM")
    axes.set_ylim(bottom=0)
    axes.legend()


def _place(report: PointReport, over_rates: bool) -> float:
    if over_rates:
        return report.point.request_rate or 0.0
    return report.point.kv_bytes / 2**20


def _draw_line(
    axes: Any, x: list[float], reports: Sequence[PointReport], name: str, label: str
) -> None:
    """Medians and ranges; hollow marks where memory does not bind."""
    ratios = [report.ratio(name) for report in reports]
    y = [ratio["median"] for ratio in ratios]
    line = axes.errorbar(x, y, yerr=_errors(ratios), capsize=3, label=label)
    color = line.lines[0].get_color()
    for report, at_x, at_y in zip(reports, x, y, strict=True):
        face = color if report.memory_binds else "white"
        axes.plot(at_x, at_y, "o", color=color, markerfacecolor=face, markersize=7)


def _errors(spreads: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Distances from the median to the ends of the range."""
    return [
        [spread["median"] - spread["min"] for spread in spreads],
        [spread["max"] - spread["median"] for spread in spreads],
    ]


def _explain_marks(axes: Any, reports: Sequence[PointReport]) -> None:
    marks = (("memory binds", "gray"), ("memory does not bind", "white"))
    for label, face in marks:
        if any(report.binds_label == label for report in reports):
            axes.plot([], [], "o", color="gray", markerfacecolor=face, label=label)


def _draw_latencies(figure: Any, reports: Sequence[PointReport]) -> None:
    """A row for each latency, a group of bars for each point."""
    sides = list(reports[0].sides)
    figure.set_size_inches(max(7, 1.6 * len(reports) * len(PERCENTILES)), 9)
    groups = [(report, p) for report in reports for p in PERCENTILES]
    width = 0.8 / len(sides)
    for axes, (key, title) in zip(figure.subplots(3), _LATENCIES, strict=True):
        for index, name in enumerate(sides):
            found = [report.sides[name][f"{key}_p{p}_s"] for report, p in groups]
            middles = [spread["median"] for spread in found]
            places = [
                group + (index + 0.5) * width - 0.4 for group in range(len(groups))
            ]
            label = side_label(name)
            axes.bar(
                places, middles, width, yerr=_errors(found), capsize=2, label=label
            )
        ticks = [f"{report.point.label}\np{p}" for report, p in groups]
        axes.set_xticks(range(len(groups)), ticks)
        axes.set_title(title, loc="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(sides))
