"""The figures of an engine, and of a server, over an interval."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pyramid_vllm.tools.monitor.scrape import Labels, Scrape

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

    def gauge(self, name: str, where: Where, is_mean: bool = False) -> float | None:
        """The sum, or the mean, over engines.

        Several front ends may report one engine, and none says which is the newest:
        of series that differ in ``pid`` alone the largest counts.
        """
        largest: dict[Labels, float] = {}
        for labels, value in self.after.select(name, where).items():
            key = tuple(label for label in labels if label[0] != "pid")
            largest[key] = max(value, largest.get(key, -math.inf))
        if not largest:
            return None
        return sum(largest.values()) / (len(largest) if is_mean else 1)

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

    def p95(self, name: str, where: Where) -> float | None:
        """95th percentile of a histogram's new values, evenly spread in their bucket.

        Of values above the last bound, that bound is all that is known.
        """
        found = _summed(self._increases(f"{name}_bucket", where), "le")
        buckets = sorted((float(bound), count) for bound, count in found.items())
        if not buckets or buckets[-1][1] <= 0:
            return None
        bounds, counts = zip((0.0, 0.0), *buckets[:-1], strict=True)
        # Just below the rank: of empty buckets behind it, none is taken.
        rank = np.nextafter(0.95 * buckets[-1][1], 0)
        return float(np.interp(rank, counts, bounds))

    def _increases(self, name: str, where: Where) -> dict[Labels, float]:
        """Increases by series; a new series began at 0."""
        if self.before is None:
            return {}
        earlier = {} if self.is_restart else self.before.series.get(name, {})
        found = self.after.select(name, where)
        return {key: value - earlier.get(key, 0) for key, value in found.items()}


#: Figures by name in the JSON: the method, the metric, the label that splits it.
_FIGURES: dict[str, tuple[Any, ...]] = {
    "num_running": (Span.gauge, "vllm:num_requests_running"),
    "num_waiting": (Span.gauge, "vllm:num_requests_waiting"),
    "num_above_stock": (Span.gauge, f"{_POLICY}num_requests_above_stock"),
    "kv_usage": (Span.gauge, "vllm:kv_cache_usage_perc", True),
    "retention": (Span.gauge, f"{_POLICY}retention", True),
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


def server_figures(span: Span) -> dict[str, Any]:
    """All figures of a server with a policy, as JSON can hold them: of each engine,
    and of all together; ``policies`` differ where engines do."""
    infos = [dict(key) for key in span.after.series.get(f"{_POLICY}info", {})]
    running = span.after.series.get("vllm:num_requests_running", {})
    keys = [*map(dict, running), *infos]
    engines = {(key.get("model_name", ""), key.get("engine", "")) for key in keys}
    reporters = {"model_name", "engine", "pid"}
    policies = {
        tuple((name, info[name]) for name in info if name not in reporters)
        for info in infos
    }
    return {
        "policies": [dict(policy) for policy in sorted(policies)],
        "engines": [
            where | {"figures": _figures(span, where)}
            for model, name in sorted(engines, key=lambda e: (e[0], by_number(e[1])))
            for where in [{"model_name": model, "engine": name}]
        ],
        "total": _figures(span, {}),
        "seconds": span.seconds,
        "is_restart": span.is_restart,
    }


def _figures(span: Span, where: Where) -> dict[str, Any]:
    """Figures of the engines with these labels; None: the server reports none."""
    return {
        field: compute(span, metric, where, *more)
        for field, (compute, metric, *more) in _FIGURES.items()
    }


def _summed(series: Mapping[Labels, float], label: str | None) -> Any:
    """Their sum, None if there are none; with a label, sums by its values."""
    if label is None:
        return sum(series.values()) if series else None
    sums: dict[str, float] = defaultdict(float)
    for key, value in series.items():
        sums[dict(key).get(label, "")] += value
    return dict(sums)


def by_number(label: str) -> tuple[int, str]:
    """Key that sorts "10" after "9"."""
    return len(label), label
