"""Reports of a bench: tables for people, medians for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.figures import (
    METRICS,
    Summary,
    memory_binds,
    summarize,
)
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


@dataclass(frozen=True)
class PointReport:
    """All sides at one point."""

    point: Point
    memory_binds: bool
    sides: dict[str, Summary]
    prefix_caching: dict[str, bool]
    """Whether the engine of each side had its prefix cache on."""
    sharing: str
    """What requests share, in words."""

    @property
    def policies(self) -> list[str]:
        """All sides but stock vLLM."""
        return [name for name in self.sides if name != NONE]

    @property
    def binds_label(self) -> str:
        """Whether memory binds, in words."""
        return "memory binds" if self.memory_binds else "memory does not bind"

    @property
    def memory_label(self) -> str:
        """The point, in words."""
        return f"{self.point.label}, {format_bytes(self.point.kv_bytes)}"

    @property
    def caching_label(self) -> str:
        """Which sides had their prefix cache on, in words."""
        states = {
            k: "on" if is_on else "off" for k, is_on in self.prefix_caching.items()
        }
        if len(set(states.values())) == 1:
            return f"prefix caching {states[NONE]}"
        sides = ", ".join(f"{side_label(k)} {state}" for k, state in states.items())
        return f"prefix caching: {sides}"

    def ratio(
        self, name: str, key: str = "total_tokens_per_s"
    ) -> dict[str, Any] | None:
        """A side's ratio to stock."""
        ratio: dict[str, Any] | None = self.sides[name][key]["ratio"]
        return ratio

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        found = vars(self).copy()
        return asdict(found.pop("point")) | found


def make_reports(
    workload: Workload, points: Sequence[Point], results: Sequence[dict[str, Any]]
) -> list[PointReport]:
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
        binds = memory_binds(fits, num_at_once, sides[NONE])
        summary = summarize(sides)
        reports.append(PointReport(point, binds, summary, caching, settings.sharing))
    return reports


def format_ratio(ratio: Mapping[str, Any] | None) -> str:
    """Median and range."""
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def point_table(report: PointReport) -> Table:
    """All figures of one point."""
    return side_table(
        METRICS,
        {name: _medians_of(side) for name, side in report.sides.items()},
        lambda name, key: format_ratio(report.ratio(name, key)),
        title=f"KV memory {report.memory_label}: {report.binds_label}",
        caption=f"{report.caching_label}; {report.sharing}\n"
        "medians; ratios to stock within each repeat: median (lowest-highest)",
    )


def _medians_of(side: Summary) -> dict[str, float]:
    return {key: spread["median"] for key, spread in side.items()}


def sweep_table(reports: Sequence[PointReport]) -> Table:
    """Ratio of tokens/s, point by point."""
    policies = reports[0].policies
    table = right_table(
        ("KV memory", "", "stock's most at once", *policies),
        "Tokens/s, prompt and output, to stock vLLM",
        caption="median (lowest-highest) over repeats",
    )
    for report in reports:
        most = report.sides[NONE]["max_num_running"]["median"]
        ratios = [format_ratio(report.ratio(name)) for name in policies]
        table.add_row(report.memory_label, report.binds_label, f"{most:.0f}", *ratios)
    return table


def medians(settings: BenchSettings, reports: Sequence[PointReport]) -> dict[str, Any]:
    """Medians of every point and side, for other programs."""
    points = []
    for report in reports:
        sides = {}
        for name, side in report.sides.items():
            found, ratio = _medians_of(side), report.ratio(name)
            sides[name] = {
                "tokens_per_s": found["total_tokens_per_s"],
                **{key: found[key] for key in _MEDIANS},
                "ratio": 1.0 if name == NONE else ratio and ratio["median"],
                "prefix_caching": report.prefix_caching[name],
            }
        points.append(
            {
                "kv_memory": report.point.label,
                "kv_bytes": report.point.kv_bytes,
                "memory_binds": report.memory_binds,
                "shared_prefix": settings.shared_prefix,
                "num_prefixes": settings.num_prefixes,
                "turns": settings.turns,
                "sides": sides,
            }
        )
    return {"points": points, "settings": settings.describe()}
