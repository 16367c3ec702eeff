"""Metrics as a vLLM server shows them, without an engine, and over HTTP."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

INFO = {
    "kv_policy": "pyramid",
    "retention": "0.4",
    "tiers": "3",
    "scorer": "attention",
    "selection": "head",
    "evict": "prompt_end",
}

GAUGES = {
    "vllm:num_requests_running": (),
    "vllm:num_requests_waiting": (),
    "vllm:kv_cache_usage_perc": (),
    "vllm:kv_policy_retention": (),
    "vllm:kv_policy_tokens_held": (),
    "vllm:kv_policy_tokens_represented": (),
    "vllm:kv_policy_num_requests_above_stock": (),
    "vllm:kv_policy_info": tuple(INFO),
}
COUNTERS = {
    "vllm:prompt_tokens": (),
    "vllm:generation_tokens": (),
    "vllm:num_preemptions": (),
    "vllm:kv_policy_tokens_evicted": ("tier",),
    "vllm:kv_policy_pages_freed": ("tier",),
    "vllm:kv_policy_compactions": ("kind",),
    "vllm:kv_policy_prefill_rows_scheduled": (),
    "vllm:kv_policy_prefill_rows_computed": (),
    "vllm:kv_policy_requests": ("kv_policy",),
    "vllm:kv_policy_requests_unpruned": ("reason",),
    "vllm:kv_policy_requests_refused": (),
    "vllm:kv_policy_outputs_capped": (),
}
HISTOGRAMS = {"vllm:kv_policy_compaction_time_seconds": (0.001, 0.01, 0.1)}


class FakeMetrics:
    """The metrics of engines with a policy; with ``has_policy`` off, stock vLLM's."""

    def __init__(
        self,
        num_engines: int = 1,
        model_name: str = "tiny",
        has_policy: bool = True,
        extra_labels: tuple[str, ...] = (),
    ) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._metrics: dict[str, Any] = {}
        labels = ("model_name", "engine", *extra_labels)
        for kind, metrics in ((Gauge, GAUGES), (Counter, COUNTERS)):
            for name, own in metrics.items():
                if has_policy or "kv_policy" not in name:
                    self._metrics[name] = kind(
                        name, name, (*labels, *own), registry=self.registry
                    )
        for name, bounds in HISTOGRAMS.items() if has_policy else ():
            self._metrics[name] = Histogram(
                name, name, labels, registry=self.registry, buckets=bounds
            )
        for engine in range(num_engines):
            self.set(
                "vllm:num_requests_running",
                0,
                engine,
                **dict.fromkeys(extra_labels, "0"),
            )
            if has_policy and not extra_labels:
                self.set("vllm:kv_policy_info", 1, engine, **INFO)

    def _child(self, name: str, engine: int, labels: dict[str, str]) -> Any:
        return self._metrics[name].labels(
            model_name=self._model_name, engine=str(engine), **labels
        )

    def set(self, name: str, value: float, engine: int = 0, **labels: str) -> None:
        self._child(name, engine, labels).set(value)

    def add(self, name: str, value: float, engine: int = 0, **labels: str) -> None:
        self._child(name, engine, labels).inc(value)

    def observe(self, name: str, *values: float, engine: int = 0) -> None:
        for value in values:
            self._child(name, engine, {}).observe(value)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


def work(metrics: FakeMetrics, engine: int = 0, num_tiers: int = 3) -> None:
    """One interval of a busy engine."""
    gauges = {
        "vllm:num_requests_running": 12,
        "vllm:num_requests_waiting": 3,
        "vllm:kv_cache_usage_perc": 0.93,
        "vllm:kv_policy_retention": 0.4,
        "vllm:kv_policy_tokens_held": 1_200_000,
        "vllm:kv_policy_tokens_represented": 3_000_000,
        "vllm:kv_policy_num_requests_above_stock": 5,
    }
    for name, value in gauges.items():
        metrics.set(name, value, engine)
    counters = {
        "vllm:prompt_tokens": 4000,
        "vllm:generation_tokens": 500,
        "vllm:num_preemptions": 1,
        "vllm:kv_policy_prefill_rows_scheduled": 24_000,
        "vllm:kv_policy_prefill_rows_computed": 18_000,
        "vllm:kv_policy_requests_refused": 1,
        "vllm:kv_policy_outputs_capped": 2,
    }
    for name, value in counters.items():
        metrics.add(name, value, engine)
    for tier in range(num_tiers):
        where = {"engine": engine, "tier": str(tier)}
        metrics.add("vllm:kv_policy_tokens_evicted", 1000 * (tier + 1), **where)
        metrics.add("vllm:kv_policy_pages_freed", 30 * (tier + 1), **where)
    metrics.add("vllm:kv_policy_compactions", 8, engine, kind="prompt")
    metrics.add("vllm:kv_policy_compactions", 2, engine, kind="generation")
    metrics.add("vllm:kv_policy_requests", 9, engine, kv_policy="pyramid")
    metrics.add("vllm:kv_policy_requests", 1, engine, kv_policy="none")
    metrics.add("vllm:kv_policy_requests_unpruned", 2, engine, reason="prompt_logprobs")
    times = (0.0005, 0.002, 0.003, 0.004)
    metrics.observe("vllm:kv_policy_compaction_time_seconds", *times, engine=engine)


@contextmanager
def serving(answer: Callable[[], tuple[int, str]]) -> Iterator[str]:
    """The address of a server whose ``/metrics`` has this status and text."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answer() if self.path == "/metrics" else (404, "")
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            """Nothing: a test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
