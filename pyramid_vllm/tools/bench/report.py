"""Figures as people read them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.figures import METRICS, Metric, side_label
from pyramid_vllm.tools.bench.summary import Summary
from pyramid_vllm.tools.bench.workload import Point
from pyramid_vllm.tools.sizes import format_bytes


@dataclass(frozen=True)
class PointReport:
    """All sides at one point."""

    point: Point
    memory_binds: bool
    sides: dict[str, Summary]
    prefix_caching: dict[str, bool]
    """Of each side, as its engine had it."""
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
    def caching_label(self) -> str:
        """Which sides had their prefix cache on, in words."""
        states = {
            name: "on" if is_on else "off"
            for name, is_on in self.prefix_caching.items()
        }
        if len(set(states.values())) == 1:
            return f"prefix caching {states[NONE]}"
        sides = ", ".join(
            f"{side_label(name)} {state}" for name, state in states.items()
        )
        return f"prefix caching: {sides}"

    def ratio(self, name: str, key: str = "total_tokens_per_s") -> dict[str, Any]:
        """A side's ratio to stock."""
        found: dict[str, Any] = self.sides[name][key]["ratio"]
        return found

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        return {
            **asdict(self.point),
            "memory_binds": self.memory_binds,
            "prefix_caching": self.prefix_caching,
            "sharing": self.sharing,
            "sides": self.sides,
        }


def format_ratio(ratio: dict[str, Any] | None) -> str:
    """Median and range."""
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def point_table(report: PointReport) -> Table:
    """All figures of one point."""
    table = Table(
        title=f"KV memory {report.point.label}, "
        f"{format_bytes(report.point.kv_bytes)}: {report.binds_label}",
        caption=f"{report.caching_label}; {report.sharing}\n"
        "medians; ratios to stock within each repeat: median (lowest-highest)",
    )
    table.add_column("")
    for name in report.sides:
        table.add_column(side_label(name), justify="right")
        if name != NONE:
            table.add_column("to stock", justify="right")
    for metric in METRICS:
        if any(metric.key in side for side in report.sides.values()):
            table.add_row(metric.label, *_cells(report, metric))
    return table


def _cells(report: PointReport, metric: Metric) -> list[str]:
    cells = []
    for name, side in report.sides.items():
        found = side.get(metric.key)
        value = "-" if found is None else found["median"] * metric.factor
        cells.append(value if isinstance(value, str) else f"{value:{metric.format}}")
        if name != NONE:
            cells.append(format_ratio(found and found["ratio"]))
    return cells


def sweep_table(reports: Sequence[PointReport]) -> Table:
    """Ratio of tokens/s, point by point."""
    policies = reports[0].policies
    table = Table(
        title="Tokens/s, prompt and output, to stock vLLM",
        caption="median (lowest-highest) over repeats",
    )
    for column in ("KV memory", "", "stock's most at once", *policies):
        table.add_column(column, justify="right")
    for report in reports:
        most = report.sides[NONE]["max_num_running"]["median"]
        table.add_row(
            f"{report.point.label}, {format_bytes(report.point.kv_bytes)}",
            report.binds_label,
            f"{most:.0f}",
            *(format_ratio(report.ratio(name)) for name in policies),
        )
    return table
