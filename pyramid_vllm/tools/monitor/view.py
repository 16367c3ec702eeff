"""Figures as a picture that fits 80 columns, and a terminal's height if it has one."""

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyramid_vllm.tools.monitor.figures import Figures, ServerFigures, number_first
from pyramid_vllm.tools.monitor.numbers import UNKNOWN, by_size, count, percent, seconds

#: Rows of the tables where nothing limits them, and at least.
MAX_ROWS, MIN_ROWS = 16, 3
#: Lines above the engines, between them and the tiers, and of the figures beside them.
_HEAD_LINES, _TIERS_HEAD_LINES, _TOTALS_LINES = 7, 2, 8

#: Of what a policy is: a narrow picture cuts the rest.
_FIRST_LABELS = ("retention", "tiers")
_ENGINE_COLUMNS = (
    "engine",
    "run",
    "wait",
    "above\nstock",
    "KV\nused",
    "entries\nheld",
    "entries\nwithout",
    "held\nshare",
    "prompt\ntok/s",
    "output\ntok/s",
    "preempt\n/s",
)


def title(console: Console, url: str, words: str) -> Text:
    """Who is watched, and when."""
    line = Text(overflow="ellipsis", no_wrap=True)
    line.append("pyramid-vllm top", style="bold").append(f"  {url}")
    right = f"{words}  {time.strftime('%H:%M:%S')}"
    line.truncate(console.width - len(right) - 2, overflow="ellipsis", pad=True)
    return line.append(f"  {right}", style="dim")


def picture(
    console: Console, url: str, server: ServerFigures, height: int | None = None
) -> RenderableType:
    """Everything of a server, in at most ``height`` lines."""
    words = f"over {server.seconds:.1f} s" if server.seconds else "rates to come"
    words = f"restarted, {words}" if server.is_restart else words
    max_engines, max_tiers = _max_rows(len(server.engines), height)
    return Group(
        title(console, url, words),
        *_names(server),
        Text(),
        _engines(server, max_engines),
        Text(),
        _beside(_tiers(server.total, max_tiers), _totals(server.total)),
    )


def _max_rows(num_engines: int, height: int | None) -> tuple[int, int]:
    """Of engines and of tiers; the figures beside the tiers come first."""
    if height is None:
        return MAX_ROWS, MAX_ROWS
    left = height - _HEAD_LINES - _TIERS_HEAD_LINES - (num_engines > 1)
    max_engines = max(left - _TOTALS_LINES, MIN_ROWS)
    return max_engines, max(left - min(num_engines, max_engines), MIN_ROWS)


def _names(server: ServerFigures) -> list[Text]:
    lines = [("model", ", ".join(server.model_names))]
    for policy in server.policies:
        first = [name for name in _FIRST_LABELS if name in policy]
        rest = [name for name in policy if name not in ("kv_policy", *first)]
        others = " ".join(f"{name}={policy[name]}" for name in (*first, *rest))
        lines.append(("policy", f"{policy.get('kv_policy', UNKNOWN)}  {others}"))
    return [
        Text(f"{name:<8}{words}", no_wrap=True, overflow="ellipsis")
        for name, words in lines[:3]
    ]


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(
            column,
            justify="right" if index else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    return table


def _engines(server: ServerFigures, max_rows: int) -> Table:
    table = _table(_ENGINE_COLUMNS)
    is_one_model = len(server.model_names) < 2
    for engine in server.engines[:max_rows]:
        name = engine.engine if is_one_model else f"{engine.model_name} {engine.engine}"
        table.add_row(*_engine_row(name, engine.figures))
    if len(server.engines) > 1:
        num_hidden = len(server.engines) - max_rows
        name = f"+{num_hidden}, all" if num_hidden > 0 else "all"
        table.add_row(*_engine_row(name, server.total), style="bold")
    return table


def _engine_row(name: str, figures: Figures) -> list[str]:
    return [
        name if len(name) <= 8 else f"{name[:4]}~{name[-3:]}",
        count(figures.num_running),
        count(figures.num_waiting),
        count(figures.num_above_stock),
        percent(figures.kv_usage),
        count(figures.entries_held),
        count(figures.entries_represented),
        percent(figures.held_share),
        count(figures.prompt_tokens_per_s),
        count(figures.generation_tokens_per_s),
        count(figures.preemptions_per_s),
    ]


def _tiers(figures: Figures, max_rows: int) -> Table:
    table = _table(("tier", "evicted/s", "pages/s"))
    evicted, freed = figures.evicted_per_s_by_tier, figures.pages_freed_per_s_by_tier
    tiers = sorted({*evicted, *freed}, key=number_first)
    for name, group in _grouped(tiers, max_rows):
        table.add_row(
            name,
            count(sum(evicted.get(tier, 0.0) for tier in group)),
            count(sum(freed.get(tier, 0.0) for tier in group)),
        )
    if not tiers:
        table.add_row("all", UNKNOWN, UNKNOWN)
    return table


def _grouped(tiers: list[str], max_rows: int) -> list[tuple[str, list[str]]]:
    """Neighbours together, if there are more tiers than rows."""
    size = -(-len(tiers) // max_rows) or 1
    groups = [tiers[at : at + size] for at in range(0, len(tiers), size)]
    return [
        (group[0] if len(group) == 1 else f"{group[0]}-{group[-1]}", group)
        for group in groups
    ]


def _totals(figures: Figures) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(style="bold", no_wrap=True, width=12)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    kinds = sorted(figures.compactions_per_s_by_kind.items(), reverse=True)
    mean, p95 = figures.compaction_mean_s, figures.compaction_p95_s
    rows = {
        "retention": count(figures.retention),
        "prefill rows": _rows(figures),
        "compactions": ", ".join(f"{count(rate)}/s {kind}" for kind, rate in kinds),
        "their time": f"mean {seconds(mean)}, p95 {seconds(p95)}",
        "requests": by_size(figures.num_requests_by_policy),
        "unpruned": by_size(figures.num_unpruned_by_reason),
        "refused": count(figures.num_refused),
        "capped": count(figures.num_capped),
    }
    for name, words in rows.items():
        table.add_row(name, words or UNKNOWN)
    return table


def _rows(figures: Figures) -> str:
    scheduled = f"{count(figures.rows_scheduled_per_s)}/s"
    if figures.computed_share is None:
        return scheduled
    return f"{percent(figures.computed_share)} of {scheduled} computed"


def _beside(left: RenderableType, right: RenderableType) -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0), expand=True)
    grid.add_column()
    grid.add_column(ratio=1)
    grid.add_row(left, right)
    return grid
