"""The policy's Prometheus metrics, with vLLM's labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.spec import length_rule, required_policy
from pyramid_vllm.stats import PolicyStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from pyramid_vllm.policy import LengthRule

PREFIX = "vllm:kv_policy_"
#: Name -> documentation and labels in addition to vLLM's.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tokens_evicted": (
        "KV entries (one token in one layer) evicted or pruned, by tier.",
        ("tier",),
    ),
    "pages_freed": (
        "Pages that evictions returned to the block pool, by tier, less the pages that "
        "prompts took to gather tokens of shared pages.",
        ("tier",),
    ),
    "compactions": (
        "Compactions of requests, of the prompt or of generated tokens.",
        ("kind",),
    ),
    "prefill_rows_scheduled": ("Prompt tokens of all steps, times layers.", ()),
    "prefill_rows_computed": ("Scheduled rows that layers computed.", ()),
    "requests": ("Accepted requests, by their policy.", ("kv_policy",)),
    "requests_unpruned": (
        "Requests with no pruned or no evicted prompt token, by reason: "
        "'prompt_logprobs' needs every row, 'short_prompt' has at most min_context "
        "tokens, 'keeps_all' keeps every token by policy, 'cached_prefix' found most "
        "of its prompt in the prefix cache.",
        ("reason",),
    ),
    "requests_refused": ("Requests refused because they can never fit.", ()),
    "outputs_capped": (
        "Requests whose output is capped at what the whole KV cache can hold.",
        (),
    ),
}
GAUGES = {
    "tokens_held": "KV entries of running requests in the cache.",
    "tokens_represented": "KV entries that the uncompressed cache would hold instead.",
    "num_requests_above_stock": "Running requests that would not fit into the "
    "uncompressed cache.",
    "retention": "Share kept of a prompt of half max_model_len tokens, mean over "
    "layers.",
}
BUCKETS = [1e-4 * step * 10**power for power in range(5) for step in (1, 2.5, 5)]


class PolicyMetrics(KVConnectorPromMetrics):
    """Counts the engines' stats; see ``PolicyStats``.

    Args:
        vllm_config: the engines' configuration.
        metric_types: classes to use for Prometheus' metrics: on Ray, Ray's.
        labelnames: vLLM's labels.
        per_engine_labelvalues: their values, by engine.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=PREFIX + name,
                documentation=documentation,
                labelnames=[*labelnames, *labels],
            )
            for name, (documentation, labels) in COUNTERS.items()
        }
        self._gauges = {
            name: self._gauge_cls(
                name=PREFIX + name,
                documentation=documentation,
                multiprocess_mode="mostrecent",
                labelnames=labelnames,
            )
            for name, documentation in GAUGES.items()
        }
        self._time = self._histogram_cls(
            name=f"{PREFIX}compaction_time_seconds",
            documentation="Time of a step to score, select and compact.",
            buckets=BUCKETS,
            labelnames=labelnames,
        )
        self._show_policy(vllm_config)

    def _show_policy(self, vllm_config: VllmConfig) -> None:
        """Set the gauges that never change."""
        policy = required_policy(vllm_config)
        num_layers = num_full_attention_layers(vllm_config.model_config.hf_text_config)
        rule = length_rule(policy, num_layers)
        num_tokens = max(1, vllm_config.model_config.max_model_len // 2)
        retention = rule.layout.mean(rule.cache_lengths(num_tokens)) / num_tokens
        labels = _info(rule, retention)
        info = self._gauge_cls(
            name=f"{PREFIX}info",
            documentation="The engine's KV policy.",
            multiprocess_mode="mostrecent",
            labelnames=[*self._labelnames, *labels],
        )
        for engine, values in self.per_engine_labelvalues.items():
            info.labels(*values, *labels.values()).set(1)
            self._set(engine, "retention", retention)
            for name in COUNTERS:
                self._start(engine, name, rule)

    def _start(self, engine: int, name: str, rule: LengthRule) -> None:
        """Create the series of known labels before they count, so that rates include
        their first steps."""
        (_, labels), values = COUNTERS[name], self.per_engine_labelvalues[engine]
        known: dict[tuple[str, ...], list[str]] = {
            (): [],
            ("tier",): [str(tier) for tier in range(rule.layout.num_tiers)],
            ("kind",): ["prompt", "generation"],
            ("kv_policy",): [rule.config.name],
        }
        if not labels:
            self._counters[name].labels(*values)
        for label in known.get(labels, []):
            self._counters[name].labels(*values, label)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an engine's stats."""
        stats = PolicyStats.of(transfer_stats_data)
        counters = stats.counters
        for name, counts in {
            "tokens_evicted": counters.evicted_tokens,
            "pages_freed": counters.pages_freed,
            "compactions": {
                "prompt": counters.num_compactions - counters.num_groups,
                "generation": counters.num_groups,
            },
            "requests": counters.requests,
            "requests_unpruned": counters.unpruned,
        }.items():
            for label, count in counts.items():
                self._add(engine_idx, name, count, label)
        self._add(engine_idx, "prefill_rows_scheduled", counters.rows_scheduled)
        self._add(engine_idx, "prefill_rows_computed", counters.rows_computed)
        self._add(engine_idx, "requests_refused", counters.num_refused_requests)
        self._add(engine_idx, "outputs_capped", counters.num_capped_outputs)
        self._set(engine_idx, "tokens_held", stats.tokens_held)
        self._set(engine_idx, "tokens_represented", stats.tokens_represented)
        self._set(engine_idx, "num_requests_above_stock", stats.num_above_stock)
        for seconds in stats.compaction_times:
            self._time.labels(*self.per_engine_labelvalues[engine_idx]).observe(seconds)

    def _add(self, engine: int, name: str, count: int, *labels: str) -> None:
        if count:
            values = self.per_engine_labelvalues[engine]
            self._counters[name].labels(*values, *labels).inc(count)

    def _set(self, engine: int, name: str, value: float) -> None:
        self._gauges[name].labels(*self.per_engine_labelvalues[engine]).set(value)


def _info(rule: LengthRule, retention: float) -> dict[str, str]:
    """Labels of the info metric."""
    config = rule.config
    return {
        "kv_policy": config.name,
        "retention": f"{retention:.3g}",
        "tiers": str(rule.layout.num_tiers),
        "scorer": config.scorer,
        "selection": config.selection,
        "evict": config.evict,
        "prune_from": str(config.prune_from),
    }
