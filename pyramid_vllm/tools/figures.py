"""Figures of sides, stock vLLM among them, and how tables show them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from pyramid_vllm.policy import NONE

PERCENTILES = (50, 95, 99)
#: Share of the prompt tokens that were in the prefix cache.
HIT_RATE = "prefix_hit_rate"
Figures = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """A figure, and how people read it."""

    key: str
    label: str
    format: str = ",.0f"
    factor: float = 1.0


def side_label(policy: str) -> str:
    """The name of a policy's side in tables and plots."""
    return "stock vLLM" if policy == NONE else policy


def latencies(
    key: str, seconds: Sequence[float], percentiles: Sequence[int] = PERCENTILES
) -> Figures:
    """Percentiles of one kind of latency; zeros where there is none."""
    found = np.percentile(seconds or [0.0], percentiles).tolist()
    return {f"{key}_p{p}_s": value for p, value in zip(percentiles, found, strict=True)}


def right_table(columns: Iterable[str], title: str, **settings: Any) -> Table:
    """A table whose columns are aligned to the right."""
    headers = (Column(name, justify="right") for name in columns)
    return Table(*headers, title=title, **settings)


def side_table(
    metrics: Sequence[Metric],
    sides: Mapping[str, Mapping[str, Any]],
    ratio: Callable[[str, str], str] | None = None,
    **settings: Any,
) -> Table:
    """A row for each metric, a column for each side.

    Args:
        metrics: the rows.
        sides: figures by side; a dash is shown for None.
        ratio: of a side and a metric's key, to stock vLLM; None: not shown.
        settings: of the table.
    """
    table = Table("", **settings)
    for name in sides:
        table.add_column(side_label(name), justify="right")
        if ratio and name != NONE:
            table.add_column("to stock", justify="right")
    for metric in metrics:
        cells = []
        for name, side in sides.items():
            value = side[metric.key]
            shown = value is not None and f"{value * metric.factor:{metric.format}}"
            cells.append(shown or "-")
            if ratio and name != NONE:
                cells.append(ratio(name, metric.key))
        table.add_row(metric.label, *cells)
    return table


def bars(console: Console, width: int, transient: bool = False) -> Progress:
    """Progress bars with descriptions of a width."""
    text = TextColumn(f"{{task.description:<{width}}}")
    columns = (text, BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=transient)
