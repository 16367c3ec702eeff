"""The figures of an engine, and of a server, over an interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyramid_vllm.tools.monitor.span import Span, summed_by

_POLICY = "vllm:kv_policy_"
_COMPACTION_TIME = f"{_POLICY}compaction_time_seconds"
#: Labels that say who reports, not what.
_REPORTERS = {"model_name", "engine", "pid"}


@dataclass(frozen=True)
class Figures:
    """Of one engine or of several; None where the server does not say."""

    num_running: float | None
    num_waiting: float | None
    num_above_stock: float | None
    kv_usage: float | None
    retention: float | None
    entries_held: float | None
    entries_represented: float | None

    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    preemptions_per_s: float | None
    evicted_per_s_by_tier: dict[str, float]
    pages_freed_per_s_by_tier: dict[str, float]
    compactions_per_s_by_kind: dict[str, float]
    rows_scheduled_per_s: float | None
    rows_computed_per_s: float | None
    compaction_mean_s: float | None
    compaction_p95_s: float | None

    num_requests_by_policy: dict[str, float]
    num_unpruned_by_reason: dict[str, float]
    num_refused: float | None
    num_capped: float | None

    @property
    def held_share(self) -> float | None:
        """Entries held, of what an uncompressed cache would hold."""
        return _ratio(self.entries_held, self.entries_represented)

    @property
    def computed_share(self) -> float | None:
        """Rows of prompts computed, of those scheduled."""
        return _ratio(self.rows_computed_per_s, self.rows_scheduled_per_s)


@dataclass(frozen=True)
class Engine:
    """One engine of a server, by its labels."""

    model_name: str
    engine: str
    figures: Figures


@dataclass(frozen=True)
class ServerFigures:
    """A server's engines, and all of them together."""

    #: What it runs with: one a policy, which is one unless engines differ.
    policies: tuple[dict[str, str], ...]
    engines: tuple[Engine, ...]
    total: Figures
    seconds: float
    is_restart: bool

    @property
    def model_names(self) -> list[str]:
        return sorted({engine.model_name for engine in self.engines})


def server_figures(span: Span) -> ServerFigures:
    """All figures of a server with a policy."""
    infos = {
        tuple(label for label in key if label[0] not in _REPORTERS)
        for key in span.after.series.get(f"{_POLICY}info", {})
    }
    return ServerFigures(
        policies=tuple(dict(info) for info in sorted(infos)),
        engines=_engines(span),
        total=figures(span, {}),
        seconds=span.seconds,
        is_restart=span.is_restart,
    )


def _engines(span: Span) -> tuple[Engine, ...]:
    names = ("vllm:num_requests_running", f"{_POLICY}info")
    keys = [dict(key) for name in names for key in span.after.series.get(name, {})]
    pairs = {(key.get("model_name", ""), key.get("engine", "")) for key in keys}
    by_number = sorted(pairs, key=lambda pair: (pair[0], number_first(pair[1])))
    return tuple(
        Engine(model, engine, figures(span, {"model_name": model, "engine": engine}))
        for model, engine in by_number
    )


def figures(span: Span, where: Mapping[str, str]) -> Figures:
    """Figures of the engines with these labels."""
    evictions = {
        "evicted_per_s_by_tier": ("tokens_evicted_total", "tier"),
        "pages_freed_per_s_by_tier": ("pages_freed_total", "tier"),
        "compactions_per_s_by_kind": ("compactions_total", "kind"),
    }
    totals = {
        "num_requests_by_policy": ("requests_total", "kv_policy"),
        "num_unpruned_by_reason": ("requests_unpruned_total", "reason"),
    }
    by_label: dict[str, Any] = {
        field: span.rates_by(_POLICY + name, where, label)
        for field, (name, label) in evictions.items()
    } | {
        field: summed_by(span.after.select(_POLICY + name, where), label)
        for field, (name, label) in totals.items()
    }
    return Figures(
        **_gauges(span, where),
        **_rates(span, where),
        **by_label,
        num_refused=_total(span, f"{_POLICY}requests_refused_total", where),
        num_capped=_total(span, f"{_POLICY}outputs_capped_total", where),
    )


def _gauges(span: Span, where: Mapping[str, str]) -> dict[str, Any]:
    sums = {
        "num_running": "vllm:num_requests_running",
        "num_waiting": "vllm:num_requests_waiting",
        "num_above_stock": f"{_POLICY}num_requests_above_stock",
        "entries_held": f"{_POLICY}tokens_held",
        "entries_represented": f"{_POLICY}tokens_represented",
    }
    means = {
        "kv_usage": "vllm:kv_cache_usage_perc",
        "retention": f"{_POLICY}retention",
    }
    found: dict[str, float | None] = {}
    for field, name in (sums | means).items():
        values = span.after.gauges(name, where).values()
        share = len(values) if field in means else 1
        found[field] = sum(values) / share if values else None
    return found


def _rates(span: Span, where: Mapping[str, str]) -> dict[str, Any]:
    names = {
        "prompt_tokens_per_s": "vllm:prompt_tokens_total",
        "generation_tokens_per_s": "vllm:generation_tokens_total",
        "preemptions_per_s": "vllm:num_preemptions_total",
        "rows_scheduled_per_s": f"{_POLICY}prefill_rows_scheduled_total",
        "rows_computed_per_s": f"{_POLICY}prefill_rows_computed_total",
    }
    mean = _ratio(
        span.increase(f"{_COMPACTION_TIME}_sum", where),
        span.increase(f"{_COMPACTION_TIME}_count", where),
    )
    return {field: span.rate(name, where) for field, name in names.items()} | {
        "compaction_mean_s": mean,
        "compaction_p95_s": span.quantile(_COMPACTION_TIME, where, 0.95),
    }


def _total(span: Span, name: str, where: Mapping[str, str]) -> float | None:
    found = span.after.select(name, where)
    return sum(found.values()) if found else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def number_first(label: str) -> tuple[int, str]:
    """Sorts "10" behind "9", and names behind numbers."""
    return (int(label), "") if label.isdecimal() else (2**31, label)
