"""Figures as a picture: a row a figure, named as in JSON, and a column an engine."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from pyramid_vllm.tools.monitor.figures import by_number


def shown(value: float | Mapping[str, float] | None) -> str:
    """A figure, for people: ``0.25``, ``1.2k``, ``12 pyramid, 3 none``."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        ordered = sorted(value.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{shown(part)} {name}" for name, part in ordered) or "-"
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def picture(server: Mapping[str, Any]) -> RenderableType:
    """Everything of a server: its address and ``server_figures``."""
    seconds, total = server["seconds"], server["total"]
    words = f"over {seconds:.1f} s" if seconds else "rates to come"
    words = f"restarted, {words}" if server["is_restart"] else words
    engines = {f"{e['model_name']} {e['engine']}": e for e in server["engines"]}
    columns = {name: engine["figures"] for name, engine in engines.items()}
    if len(columns) > 1:
        columns["all"] = total
    table = _table("", *columns)
    for name in total:
        if not name.endswith("_by_tier"):
            label = name.removeprefix("num_").replace("_per_s", "/s").replace("_", " ")
            table.add_row(label, *(shown(of[name]) for of in columns.values()))
    tiers = _table("tier", "evicted/s", "pages/s")
    evicted, freed = total["evicted_per_s_by_tier"], total["pages_freed_per_s_by_tier"]
    for tier in sorted({*evicted, *freed}, key=by_number):
        tiers.add_row(tier, shown(evicted.get(tier)), shown(freed.get(tier)))
    beside = Table.grid(padding=(0, 3, 0, 0))
    beside.add_row(table, tiers)
    return Group(
        f"{time.strftime('%H:%M:%S')}  {words}  {server['url']}",
        *(", ".join(map("=".join, policy.items())) for policy in server["policies"]),
        beside,
    )


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
