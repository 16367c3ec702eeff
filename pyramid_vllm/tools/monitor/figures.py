"""The figures of an engine, and of a server, over an interval."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyramid_vllm.tools.monitor.scrape import Labels, Scrape

#: Figures by their names in ``_FIGURES``; None: the server does not report it.
Figures = dict[str, Any]
Where = Mapping[str, str]
_POLICY = "vllm:kv_policy_"


@dataclass(frozen=True)
class Span:
    """What happened between two readings.

    Counters count by what they grew. Without an earlier reading there are no rates.
    """

    before: Scrape | None
    after: Scrape

    @property
    def seconds(self) -> float:
        """Length of the interval."""
        return self.after.taken - self.before.taken if self.before else 0.0

    @cached_property
    def is_restart(self) -> bool:
        """A counter fell: this is another server, whose counters all began at 0."""
        earlier = self.before.series if self.before else {}
        return any(
            value < earlier.get(name, {}).get(key, 0)
            for name, found in self.after.series.items()
            if name.endswith(("_total", "_count", "_bucket"))
            for key, value in found.items()
        )

    def gauge(self, name: str, where: Where) -> float | None:
        """The sum over engines.

        Several front ends may report one engine, and none says which is the newest:
        of series that differ in ``pid`` alone the largest counts.
        """
        largest = self._gauges(name, where)
        return sum(largest.values()) if largest else None

    def mean_gauge(self, name: str, where: Where) -> float | None:
        """The mean over engines."""
        largest = self._gauges(name, where)
        return sum(largest.values()) / len(largest) if largest else None

    def _gauges(self, name: str, where: Where) -> dict[Labels, float]:
        largest: dict[Labels, float] = {}
        for key, value in self.after.select(name, where).items():
            key = tuple(label for label in key if label[0] != "pid")
            largest[key] = max(value, largest.get(key, -math.inf))
        return largest

    def total(self, name: str, where: Where, label: str | None = None) -> Any:
        """A counter's value since the server began, by a label's values."""
        return _summed(self.after.select(name, where), label)

    def rate(self, name: str, where: Where, label: str | None = None) -> Any:
        """Increase of a counter per second, by a label's values."""
        found = self._increases(name, where)
        return _summed({k: v / self.seconds for k, v in found.items()}, label)

    def mean(self, name: str, where: Where) -> float | None:
        """Mean of a histogram's new values."""
        count = sum(self._increases(f"{name}_count", where).values())
        total = sum(self._increases(f"{name}_sum", where).values())
        return total / count if count else None

    def p95(self, name: str, where: Where) -> Any:
        """95th percentile of a histogram's new values, evenly spread in their bucket.

        Of values above the last bound, that bound is all that is known.
        """
        found = _summed(self._increases(f"{name}_bucket", where), "le")
        buckets = sorted((float(bound), count) for bound, count in found.items())
        if not buckets or buckets[-1][1] <= 0:
            return None
        rank, low, below = 0.95 * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if math.isinf(bound):
                break
            if count >= rank and count > below:
                return low + (bound - low) * (rank - below) / (count - below)
            low, below = bound, count
        return low

    def _increases(self, name: str, where: Where) -> dict[Labels, float]:
        """Increases by series; a new series began at 0."""
        if self.before is None:
            return {}
        earlier = {} if self.is_restart else self.before.series.get(name, {})
        found = self.after.select(name, where)
        return {key: value - earlier.get(key, 0) for key, value in found.items()}


#: Figures by name in the JSON: the method, the metric, the label that splits it.
_FIGURES: dict[str, Any] = {
    "num_running": (Span.gauge, "vllm:num_requests_running"),
    "num_waiting": (Span.gauge, "vllm:num_requests_waiting"),
    "num_above_stock": (Span.gauge, f"{_POLICY}num_requests_above_stock"),
    "kv_usage": (Span.mean_gauge, "vllm:kv_cache_usage_perc"),
    "retention": (Span.mean_gauge, f"{_POLICY}retention"),
    "entries_held": (Span.gauge, f"{_POLICY}tokens_held"),
    "entries_represented": (Span.gauge, f"{_POLICY}tokens_represented"),
    "prompt_tokens_per_s": (Span.rate, "vllm:prompt_tokens_total"),
    "generation_tokens_per_s": (Span.rate, "vllm:generation_tokens_total"),
    "preemptions_per_s": (Span.rate, "vllm:num_preemptions_total"),
    "evicted_per_s_by_tier": (Span.rate, f"{_POLICY}tokens_evicted_total", "tier"),
    "pages_freed_per_s_by_tier": (Span.rate, f"{_POLICY}pages_freed_total", "tier"),
    "compactions_per_s_by_kind": (Span.rate, f"{_POLICY}compactions_total", "kind"),
    "rows_scheduled_per_s": (Span.rate, f"{_POLICY}prefill_rows_scheduled_total"),
    "rows_computed_per_s": (Span.rate, f"{_POLICY}prefill_rows_computed_total"),
    "compaction_mean_s": (Span.mean, f"{_POLICY}compaction_time_seconds"),
    "compaction_p95_s": (Span.p95, f"{_POLICY}compaction_time_seconds"),
    "num_requests_by_policy": (Span.total, f"{_POLICY}requests_total", "kv_policy"),
    "num_unpruned_by_reason": (
        Span.total,
        f"{_POLICY}requests_unpruned_total",
        "reason",
    ),
    "num_refused": (Span.total, f"{_POLICY}requests_refused_total"),
    "num_capped": (Span.total, f"{_POLICY}outputs_capped_total"),
}


@dataclass(frozen=True)
class Engine:
    """One engine of a server, by its labels."""

    model_name: str
    engine: str
    figures: Figures


@dataclass(frozen=True)
class ServerFigures:
    """A server's engines, and all of them together."""

    #: Labels of the policies that run: one, unless engines differ.
    policies: tuple[dict[str, str], ...]
    engines: tuple[Engine, ...]
    total: Figures
    seconds: float
    is_restart: bool


def server_figures(span: Span) -> ServerFigures:
    """All figures of a server with a policy."""
    infos = [dict(key) for key in span.after.series.get(f"{_POLICY}info", {})]
    running = span.after.series.get("vllm:num_requests_running", {})
    keys = [*map(dict, running), *infos]
    pairs = {(key.get("model_name", ""), key.get("engine", "")) for key in keys}
    reporters = {"model_name", "engine", "pid"}
    policies = {
        tuple(item for item in info.items() if item[0] not in reporters)
        for info in infos
    }
    return ServerFigures(
        policies=tuple(dict(policy) for policy in sorted(policies)),
        engines=tuple(
            Engine(model, name, _figures(span, {"model_name": model, "engine": name}))
            for model, name in sorted(pairs, key=lambda p: (p[0], number_first(p[1])))
        ),
        total=_figures(span, {}),
        seconds=span.seconds,
        is_restart=span.is_restart,
    )


def _figures(span: Span, where: Where) -> Figures:
    """Figures of the engines with these labels."""
    return {
        field: compute(span, metric, where, *label)
        for field, (compute, metric, *label) in _FIGURES.items()
    }


def _summed(series: Mapping[Labels, float], label: str | None) -> Any:
    """Their sum, None if there are none; with a label, sums by its values."""
    if label is None:
        return sum(series.values()) if series else None
    sums: dict[str, float] = defaultdict(float)
    for key, value in series.items():
        sums[dict(key).get(label, "")] += value
    return dict(sums)


def number_first(label: str) -> tuple[int, str]:
    """Key that sorts "10" after "9", and names after numbers."""
    return (int(label), "") if label.isdecimal() else (2**31, label)
