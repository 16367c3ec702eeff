"""Figures as a picture that fits 80 columns, and a terminal's height if it has one."""

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyramid_vllm.tools.monitor.figures import Figures, ServerFigures, number_first

UNKNOWN = "-"
#: The most rows of a table, and the fewest however low the terminal is.
_MAX_ROWS, _MIN_ROWS = 16, 3
#: Lines above the engines, of the header of the tiers, of the figures beside them.
_HEAD_LINES, _TIERS_HEAD_LINES, _TOTALS_LINES = 7, 2, 8


def count(value: float | None) -> str:
    """At most 5 characters: ``0.25``, ``7``, ``1.2k``, ``345M``."""
    if value is None:
        return UNKNOWN
    if value < 10:
        return f"{value:.2f}".rstrip("0").rstrip(".")
    unit = ""
    for larger in "kMGT":
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.{1 if unit and value < 9.95 else 0}f}{unit}"


def percent(part: float | None, whole: float | None = 1.0) -> str:
    """A share, for people."""
    return UNKNOWN if part is None or not whole else f"{part / whole:.0%}"


def seconds(value: float | None) -> str:
    """A time, for people."""
    if value is None:
        return UNKNOWN
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def by_size(values: dict[str, float]) -> str:
    """Largest first: ``12 pyramid, 3 none``."""
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count(value)} {name}" for name, value in ordered)


def title(console: Console, url: str, words: str) -> Text:
    """A line with the server that is watched and the time of the reading."""
    right = f"{words}  {time.strftime('%H:%M:%S')}"
    line = Text.assemble(("pyramid-vllm top", "bold"), f"  {url}", no_wrap=True)
    line.truncate(console.width - len(right) - 2, overflow="ellipsis", pad=True)
    return line.append(f"  {right}", style="dim")


def picture(
    console: Console, url: str, server: ServerFigures, height: int | None = None
) -> RenderableType:
    """Everything of a server, in at most ``height`` lines."""
    words = f"over {server.seconds:.1f} s" if server.seconds else "rates to come"
    words = f"restarted, {words}" if server.is_restart else words
    num_engines = len(server.engines)
    max_engines = max_tiers = _MAX_ROWS
    if height is not None:
        # The figures beside the tiers come first, then engines, then tiers.
        left = height - _HEAD_LINES - _TIERS_HEAD_LINES - (num_engines > 1)
        max_engines = max(left - _TOTALS_LINES, _MIN_ROWS)
        max_tiers = max(left - min(num_engines, max_engines), _MIN_ROWS)
    beside = Table.grid(padding=(0, 3, 0, 0), expand=True)
    beside.add_column()
    beside.add_column(ratio=1)
    beside.add_row(_tiers(server.total, max_tiers), _totals(server.total))
    return Group(
        title(console, url, words),
        *_names(server),
        Text(),
        _engines(server, max_engines),
        Text(),
        beside,
    )


def _names(server: ServerFigures) -> list[Text]:
    models = sorted({engine.model_name for engine in server.engines})
    lines = [("model", ", ".join(models))]
    for policy in server.policies:
        # A narrow terminal cuts the end of the line.
        names = dict.fromkeys(("retention", "tiers", *policy))
        words = [f"{n}={policy[n]}" for n in names if n in policy and n != "kv_policy"]
        lines.append(("policy", f"{policy.get('kv_policy')}  {' '.join(words)}"))
    return [
        Text(f"{name:<8}{words}", no_wrap=True, overflow="ellipsis")
        for name, words in lines[:3]
    ]


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _engines(server: ServerFigures, max_rows: int) -> Table:
    columns = "engine|run|wait|above\nstock|KV\nused|entries\nheld|entries\nwithout"
    columns += "|held\nshare|prompt\ntok/s|output\ntok/s|preempt\n/s"
    table = _table(columns.split("|"))
    is_one_model = len({engine.model_name for engine in server.engines}) < 2
    for engine in server.engines[:max_rows]:
        name = engine.engine if is_one_model else f"{engine.model_name} {engine.engine}"
        table.add_row(*_engine_row(name, engine.figures))
    if len(server.engines) > 1:
        num_hidden = len(server.engines) - max_rows
        name = f"+{num_hidden}, all" if num_hidden > 0 else "all"
        table.add_row(*_engine_row(name, server.total), style="bold")
    return table


def _engine_row(name: str, of: Figures) -> list[str]:
    return [
        name if len(name) <= 8 else f"{name[:4]}~{name[-3:]}",
        *map(count, (of["num_running"], of["num_waiting"], of["num_above_stock"])),
        percent(of["kv_usage"]),
        *map(count, (of["entries_held"], of["entries_represented"])),
        percent(of["entries_held"], of["entries_represented"]),
        count(of["prompt_tokens_per_s"]),
        count(of["generation_tokens_per_s"]),
        count(of["preemptions_per_s"]),
    ]


def _tiers(of: Figures, max_rows: int) -> Table:
    """A row a tier, or several neighbours where there are more tiers than rows."""
    table = _table(("tier", "evicted/s", "pages/s"))
    columns = of["evicted_per_s_by_tier"], of["pages_freed_per_s_by_tier"]
    tiers = sorted({*columns[0], *columns[1]}, key=number_first)
    size = -(-len(tiers) // max_rows) or 1
    for start in range(0, len(tiers), size):
        group = tiers[start : start + size]
        sums = [sum(column.get(tier, 0.0) for tier in group) for column in columns]
        name = group[0] if len(group) == 1 else f"{group[0]}-{group[-1]}"
        table.add_row(name, *map(count, sums))
    if not tiers:
        table.add_row("all", UNKNOWN, UNKNOWN)
    return table


def _totals(of: Figures) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(style="bold", no_wrap=True, width=12)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    kinds = sorted(of["compactions_per_s_by_kind"].items(), reverse=True)
    scheduled, computed = of["rows_scheduled_per_s"], of["rows_computed_per_s"]
    rows = f"{count(scheduled)}/s"
    if scheduled and computed is not None:
        rows = f"{percent(computed, scheduled)} of {rows} computed"
    mean, p95 = seconds(of["compaction_mean_s"]), seconds(of["compaction_p95_s"])
    lines = {
        "retention": count(of["retention"]),
        "prefill rows": rows,
        "compactions": ", ".join(f"{count(rate)}/s {kind}" for kind, rate in kinds),
        "their time": f"mean {mean}, p95 {p95}",
        "requests": by_size(of["num_requests_by_policy"]),
        "unpruned": by_size(of["num_unpruned_by_reason"]),
        "refused": count(of["num_refused"]),
        "capped": count(of["num_capped"]),
    }
    for name, words in lines.items():
        table.add_row(name, words or UNKNOWN)
    return table
