"""Reports of a bench: tables for people, medians for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.figures import METRICS, Summary, memory_binds, summarize
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.bench.workload import Point, Workload
from pyramid_vllm.tools.figures import HIT_RATE, right_table, side_label, side_table
from pyramid_vllm.tools.sizes import format_bytes

#: Figures of a side in the file of medians, beside its tokens/s.
_MEDIANS = (
    "max_num_running",
    "num_rows_computed",
    "num_preemptions",
    "num_prompt_tokens_computed",
    HIT_RATE,
    "ttft_p50_s",
    "tpot_p50_s",
    "kv_bytes_per_request",
)
_SPEED = "total_tokens_per_s"

#: A point as the file of results has it: its memory and whether that binds, the
#: summaries of all sides, and whether each of them had its prefix cache on.
Report = dict[str, Any]


def make_reports(
    workload: Workload, points: Sequence[Point], results: Sequence[dict[str, Any]]
) -> list[Report]:
    """The reports of all points, from the results of all runs."""
    settings = workload.settings
    reports = []
    num_at_once = min(settings.num_prompts, settings.max_num_seqs)
    for point in points:
        sides: dict[str, list[dict[str, float]]] = {}
        caching: dict[str, bool] = {}
        for result in results:
            if result["point"] == asdict(point):
                sides.setdefault(result["side"], []).append(result["figures"])
                caching[result["side"]] = result["raw"]["prefix_caching"]
        fits = workload.stock_fits(point.kv_bytes, num_at_once)
        reports.append(
            {
                **asdict(point),
                "memory_binds": memory_binds(fits, num_at_once, sides[NONE]),
                "sides": summarize(sides),
                "prefix_caching": caching,
                "sharing": settings.sharing,
            }
        )
    return reports


def caching_label(caching: Mapping[str, bool]) -> str:
    """Which sides had their prefix cache on, in words."""
    states = {name: "on" if is_on else "off" for name, is_on in caching.items()}
    if len(set(states.values())) == 1:
        return f"prefix caching {states[NONE]}"
    sides = ", ".join(f"{side_label(k)} {state}" for k, state in states.items())
    return f"prefix caching: {sides}"


def _memory_labels(report: Report) -> tuple[str, str]:
    """The memory and whether it binds, in words."""
    binds = "memory binds" if report["memory_binds"] else "memory does not bind"
    return f"{report['label']}, {format_bytes(report['kv_bytes'])}", binds


def format_ratio(ratio: Mapping[str, Any] | None) -> str:
    """Median and range."""
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def point_table(report: Report) -> Table:
    """All figures of one point."""
    sides, caching = report["sides"], caching_label(report["prefix_caching"])
    return side_table(
        METRICS,
        {name: _medians_of(side) for name, side in sides.items()},
        lambda name, key: format_ratio(sides[name][key]["ratio"]),
        title=f"KV memory {': '.join(_memory_labels(report))}",
        caption=f"{caching}; {report['sharing']}\n"
        "medians; ratios to stock within each repeat: median (lowest-highest)",
    )


def _medians_of(side: Summary) -> dict[str, float]:
    return {key: spread["median"] for key, spread in side.items()}


def sweep_table(reports: Sequence[Report]) -> Table:
    """Ratio of tokens/s, point by point."""
    policies = [name for name in reports[0]["sides"] if name != NONE]
    table = right_table(
        ("KV memory", "", "stock's most at once", *policies),
        "Tokens/s, prompt and output, to stock vLLM",
        caption="median (lowest-highest) over repeats",
    )
    for report in reports:
        sides = report["sides"]
        most = sides[NONE]["max_num_running"]["median"]
        ratios = [format_ratio(sides[name][_SPEED]["ratio"]) for name in policies]
        table.add_row(*_memory_labels(report), f"{most:.0f}", *ratios)
    return table


def medians(settings: BenchSettings, reports: Sequence[Report]) -> dict[str, Any]:
    """Medians of every point and side, for other programs."""
    points = []
    for report in reports:
        sides = {}
        for name, side in report["sides"].items():
            found = _medians_of(side)
            sides[name] = {
                "tokens_per_s": found[_SPEED],
                **{key: found[key] for key in _MEDIANS},
                "ratio": side[_SPEED]["ratio"]["median"],
                "prefix_caching": report["prefix_caching"][name],
            }
        points.append(
            {
                "kv_memory": report["label"],
                "kv_bytes": report["kv_bytes"],
                "memory_binds": report["memory_binds"],
                "shared_prefix": settings.shared_prefix,
                "num_prefixes": settings.num_prefixes,
                "turns": settings.turns,
                "sides": sides,
            }
        )
    return {"points": points, "settings": settings.describe()}
