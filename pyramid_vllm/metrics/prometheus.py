"""The policy's Prometheus metrics, beside vLLM's and with the same labels."""

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
#: Name -> documentation and labels beside vLLM's.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tokens_evicted": (
        "KV entries (one token in one layer) evicted or pruned, by tier.",
        ("tier",),
    ),
    "pages_freed": (
        "Pages that evictions gave back to the block pool, by tier; less those that "
        "a prompt took to leave shared ones.",
        ("tier",),
    ),
    "compactions": (
        "Times that a request was compacted, at its prompt or in generation.",
        ("kind",),
    ),
    "prefill_rows_scheduled": ("Prompt tokens of all steps, times layers.", ()),
    "prefill_rows_computed": ("Of the scheduled rows, those that layers computed.", ()),
    "requests": ("Requests taken on, by the policy they run under.", ("kv_policy",)),
    "requests_unpruned": (
        "Requests of whose prompts nothing is pruned or evicted, by reason: "
        "'prompt_logprobs' needs every row, 'short_prompt' is at most min_context "
        "tokens, 'keeps_all' is the policy's own count.",
        ("reason",),
    ),
    "requests_refused": ("Requests that ended with an error: they cannot fit.", ()),
    "outputs_capped": (
        "Requests whose output may end where the whole KV cache does.",
        (),
    ),
}
GAUGES = {
    "tokens_held": "KV entries of running requests in the cache.",
    "tokens_represented": "KV entries that the uncompressed cache would hold of them.",
    "num_requests_above_stock": "Running requests that the uncompressed cache would "
    "have no room for.",
    "retention": "Share of a prompt of half max_model_len that the policy keeps, mean "
    "over layers.",
}
BUCKETS = [1e-4 * step * 10**power for power in range(5) for step in (1, 2.5, 5)]


class PolicyMetrics(KVConnectorPromMetrics):
    """Counts what engines tell; see ``PolicyStats``.

    Args:
        vllm_config: of the engines.
        metric_types: what stands for Prometheus' own metrics: on Ray, Ray's.
        labelnames: vLLM's.
        per_engine_labelvalues: of these, by engine.
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
            documentation="Time that a step took to score, select and compact.",
            buckets=BUCKETS,
            labelnames=labelnames,
        )
        self._show_policy(vllm_config)

    def _show_policy(self, vllm_config: VllmConfig) -> None:
        """The gauges that stay as they are."""
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
        """Let a series of known labels exist before it counts, so that rates of its
        first steps are seen."""
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
        """Add what an engine tells."""
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
    """What the info metric's labels say."""
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
