"""Metrics, the log line and spans report what the scheduler and the workers did."""

import logging
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from pyramid_vllm.stats import PolicyCounters, PolicyStats
from tests.engines import (
    close,
    make_llm,
    random_prompts,
    scheduler_of,
    worker_of,
)

LENGTHS = (400, 500, 20, 300)
#: Prunes rows, compacts prompts and compresses generation.
POLICY = {
    "kv_policy": "pyramidinfer",
    "kv_policy_config": {"recent_ratio": 0.1, "prefill_decay_ratio": 0.6},
}
PREFIX = "vllm:kv_policy_"


class Collector(ThreadingHTTPServer):
    """Takes OpenTelemetry's spans over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
                    ExportTraceServiceRequest,
                )

                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        outer.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Nothing."""

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def llm(tiny_llama: str, collector: Collector) -> Iterator[Any]:
    from opentelemetry import trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        engine = make_llm(
            tiny_llama,
            **POLICY,
            max_num_batched_tokens=512,
            disable_log_stats=False,
            otlp_traces_endpoint=f"http://127.0.0.1:{collector.server_port}/v1/traces",
        )
        yield engine
        close(engine)
        # While its collector is there: it would retry when the process ends.
        provider: Any = trace.get_tracer_provider()
        provider.shutdown()


@pytest.fixture(scope="module")
def served(llm: Any) -> Any:
    """An engine that has served prompts of every kind."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(list(LENGTHS))]
    params = [
        SamplingParams(max_tokens=48, ignore_eos=True, detokenize=False, **own)
        for own in (
            {},
            {"prompt_logprobs": 0},
            {},
            {"extra_args": {"kv_policy": "none"}},
        )
    ]
    llm.generate(prompts, params, use_tqdm=False)
    return llm


def values(llm: Any, name: str, label: str | None = None) -> dict[str, Any]:
    """A metric's values, by one label."""
    found = [metric for metric in llm.get_metrics() if metric.name == PREFIX + name]
    assert found, name
    assert all(metric.labels["engine"] == "0" for metric in found)
    return {metric.labels[label] if label else "": metric for metric in found}


def counts(llm: Any, name: str, label: str) -> dict[str, int]:
    return {key: metric.value for key, metric in values(llm, name, label).items()}


def value(llm: Any, name: str) -> float:
    return float(values(llm, name)[""].value)


def test_counters_are_the_scheduler_s_own(served: Any) -> None:
    counters = scheduler_of(served).kv_counters
    assert counters.num_evicted_tokens > 0
    assert counts(served, "tokens_evicted", "tier") == counters.evicted_tokens
    assert counts(served, "pages_freed", "tier") == counters.pages_freed
    assert counts(served, "compactions", "kind") == {
        "prompt": counters.num_compactions - counters.num_groups,
        "generation": counters.num_groups,
    }
    assert counters.num_groups > 0
    assert counts(served, "requests", "kv_policy") == {"pyramidinfer": 3, "none": 1}
    assert counts(served, "requests_unpruned", "reason") == {
        "prompt_logprobs": 1,
        "short_prompt": 1,
        "keeps_all": 1,
    }


def test_counters_are_the_workers_own(served: Any) -> None:
    (worker,) = served.collective_rpc("kv_policy_stats")
    assert worker["num_plans"] > 40
    assert (
        sum(counts(served, "pages_freed", "tier").values())
        == (worker["num_pages_freed"])
    )
    compactions = counts(served, "compactions", "kind")
    assert sum(compactions.values()) == worker["num_compactions"]
    num_layers = len(worker["rows_computed"])
    assert value(served, "prefill_rows_scheduled") == (
        worker["rows_scheduled"] * num_layers
    )
    computed = value(served, "prefill_rows_computed")
    assert computed == sum(worker["rows_computed"])
    assert computed < value(served, "prefill_rows_scheduled")


def test_pages_freed_are_those_that_the_block_pool_got(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted in vLLM's own pool, while a request that evicts is served."""
    from vllm import SamplingParams

    scheduler = scheduler_of(served)
    pool = scheduler.kv_cache_manager.block_pool
    freed, free_blocks, is_evicting = [0], pool.free_blocks, [False]
    free_evicted = scheduler._free_evicted

    def count_blocks(blocks: Any) -> None:
        blocks = list(blocks)
        freed[0] += len(blocks) if is_evicting[0] else 0
        free_blocks(blocks)

    def evict(plan: Any) -> None:
        is_evicting[0] = True
        free_evicted(plan)
        is_evicting[0] = False

    monkeypatch.setattr(pool, "free_blocks", count_blocks)
    monkeypatch.setattr(scheduler, "_free_evicted", evict)
    before = sum(counts(served, "pages_freed", "tier").values())
    # Every row is computed for it and evicted afterwards; nothing is pruned before.
    sampling = SamplingParams(max_tokens=2, prompt_logprobs=0, detokenize=False)
    (prompt,) = random_prompts([500])
    served.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    assert freed[0] > 0
    assert sum(counts(served, "pages_freed", "tier").values()) - before == freed[0]


def test_every_step_that_compacts_is_timed(served: Any) -> None:
    (times,) = values(served, "compaction_time_seconds").values()
    (worker,) = served.collective_rpc("kv_policy_stats")
    assert 0 < times.count <= worker["num_compactions"]
    assert times.sum > 0


def test_gauges_say_what_running_requests_hold(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, seen = scheduler_of(served), []
    make_stats = scheduler.make_stats

    def look(*args: Any, **kwargs: Any) -> Any:
        held = sum(
            (request.num_computed_tokens - evicted) * size
            for request in scheduler.running
            for evicted, size in zip(
                scheduler.tier_lengths.evicted(request.request_id),
                scheduler.kv_rule.layout.sizes,
                strict=True,
            )
        )
        stats = make_stats(*args, **kwargs)
        told = stats.kv_connector_stats["kv_policy"]
        seen.append((held, told["tokens_held"], told["tokens_represented"]))
        return stats

    monkeypatch.setattr(scheduler, "make_stats", look)
    (prompt,) = random_prompts([600])
    served.generate([{"prompt_token_ids": prompt}], use_tqdm=False)
    assert all(held == told for held, told, _ in seen)
    assert any(0 < told < represented for _, told, represented in seen)
    assert 0 < value(served, "retention") < 1


def test_requests_above_stock_are_those_its_cache_has_no_room_for(
    served: Any,
) -> None:
    import numpy as np

    report = scheduler_of(served).kv_report
    num_pages = report._num_pages
    pages_of_stock = 6 * -(-330 // 32)  # of 6 layers
    fit = num_pages // pages_of_stock
    lengths = np.full(fit + 5, 330)
    assert report.num_stock_sequences(lengths) == fit
    # The shortest ones are there first, whatever the order.
    assert report.num_stock_sequences(np.append(lengths[: fit - 1], 1)) == fit


def test_the_log_line_sums_up(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    from pyramid_vllm.metrics.log_line import PolicyLogging

    line = PolicyLogging("pyramid")
    written: list[str] = []
    line.log(lambda text, *args: written.append(text % args))
    assert not written
    counters = PolicyCounters(
        pages_freed={"0": 1, "1": 2}, evicted_tokens={"1": 7}, num_compactions=2
    )
    for held in (30, 50):
        stats = PolicyStats(counters, held, 100, 3, (0.002,))
        line.observe(pickle.loads(pickle.dumps(stats.payload())))
    line.log(lambda text, *args: written.append(text % args))
    assert written == [
        "KV policy pyramid: held 40.0% of the tokens of running requests, 4 "
        "compactions, 6 pages freed, 14 KV entries evicted, 2.0 ms per compacting "
        "step, up to 3 requests more than the uncompressed cache holds"
    ]


def test_the_line_stands_in_vllm_s_periodic_log(served: Any) -> None:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, log = Lines(), logging.getLogger("vllm")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        # Made anew: vLLM makes its line's logger where the level lets it.
        manager = served.llm_engine.logger_manager
        from vllm.v1.metrics.loggers import LoggingStatLogger

        stat_logger = LoggingStatLogger(served.llm_engine.vllm_config)
        manager.stat_loggers.insert(0, stat_logger)
        (prompt,) = random_prompts([600])
        served.generate([{"prompt_token_ids": prompt}], use_tqdm=False)
        stat_logger.log()
    finally:
        manager.stat_loggers.remove(stat_logger)
        log.removeHandler(handler)
        log.setLevel(level)
    (line,) = [line for line in lines if "held" in line]
    assert "pages freed" in line
    assert "1 compactions" not in line  # the prompt's chunks, and generation


def test_spans_tell_the_policy_and_what_it_keeps(
    served: Any, collector: Collector
) -> None:
    from opentelemetry import trace

    provider: Any = trace.get_tracer_provider()
    provider.force_flush()
    spans = [
        {pair.key: pair.value for pair in span.attributes}
        for span in collector.spans
        if span.name == "llm_request"
    ]
    by_prompt = {span["gen_ai.usage.prompt_tokens"].int_value: span for span in spans}
    whole, kept = by_prompt[300], by_prompt[400]
    assert whole["vllm.kv_policy.name"].string_value == "none"
    assert whole["vllm.kv_policy.retained_tokens"].double_value == 300
    assert kept["vllm.kv_policy.name"].string_value == "pyramidinfer"
    by_tier = [
        item.int_value
        for item in kept["vllm.kv_policy.retained_tokens_by_tier"].array_value.values
    ]
    assert tuple(by_tier) == scheduler_of(served).kv_rule.cache_lengths(400)
    mean = kept["vllm.kv_policy.retained_tokens"].double_value
    assert mean == pytest.approx(sum(by_tier) / len(by_tier))


def test_a_step_s_times_wait_for_an_output(served: Any) -> None:
    """Nothing is set on vLLM's one empty output, which all steps share."""
    from vllm.v1.outputs import (
        EMPTY_MODEL_RUNNER_OUTPUT,
        AsyncModelRunnerOutput,
        ModelRunnerOutput,
    )

    from pyramid_vllm.stats import TIMES_ATTRIBUTE
    from pyramid_vllm.worker.timing import HostTimer, with_times

    class Later(AsyncModelRunnerOutput):
        def get_output(self) -> ModelRunnerOutput:
            return ModelRunnerOutput(req_ids=[], req_id_to_index={})

        def get_kv_connector_output(self) -> str:
            return "saved"

    timer = HostTimer()
    for has_compacted in (True, False, True):
        with timer.part():
            pass
        timer.end_step(has_compacted)
    assert with_times(None, timer) is None
    assert with_times(EMPTY_MODEL_RUNNER_OUTPUT, timer) is EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, TIMES_ATTRIBUTE)
    later = with_times(Later(), timer)
    assert later.get_kv_connector_output() == "saved"
    output = later.get_output()
    assert len(getattr(output, TIMES_ATTRIBUTE)) == 2
    assert with_times(output, timer) is output
    assert worker_of(served).tier_state.timer.take() == ()


def test_whoever_unpickles_the_configuration_has_the_loggers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A front end without them would take the stats for those of a connector."""
    import subprocess
    import sys

    from pyramid_vllm.metrics.config import MarkedConfig, reaches_plugins

    config = MarkedConfig({"kv_policy": "pyramid"})
    code = (
        "import pickle, sys\n"
        "config = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "from vllm.v1.metrics.loggers import LoggingStatLogger\n"
        "from pyramid_vllm.metrics.config import reaches_plugins\n"
        "assert reaches_plugins(config) and config == {'kv_policy': 'pyramid'}\n"
        "print(LoggingStatLogger.__init__.__wrapped__.__qualname__)\n"
    )
    command = [sys.executable, "-c", code, pickle.dumps(config).hex()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.split()[-1] == "LoggingStatLogger.__init__", result.stderr
    assert reaches_plugins(pickle.loads(pickle.dumps(config)))
    assert not reaches_plugins(dict(config))
    envs = SimpleNamespace(VLLM_USE_RUST_FRONTEND=True)
    monkeypatch.setattr("pyramid_vllm.metrics.config.envs", envs)
    assert not reaches_plugins(config)


def test_without_the_mark_nothing_is_sent(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_of(served)
    assert scheduler.make_stats().kv_connector_stats is not None
    monkeypatch.setattr(scheduler, "_tells_stats", False)
    assert scheduler.make_stats().kv_connector_stats is None


def test_on_ray_they_are_ray_s_metrics(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util import metrics
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    counted: list[tuple[str, float, dict[str, str]]] = []

    def inc(self: Any, value: float = 1.0, tags: Any = None) -> None:
        counted.append((self.info["name"], value, dict(tags)))

    monkeypatch.setattr(metrics.Counter, "inc", inc)
    logger = RayPrometheusStatLogger(served.llm_engine.vllm_config, [0])
    counters = PolicyCounters(pages_freed={"1": 3}, num_compactions=2)
    stats = PolicyStats(counters, 1, 2, 0, (0.1,))
    logger.kv_connector_prom.observe(stats.payload(), 0)
    by_name = {name: (value, tags) for name, value, tags in counted}
    value, tags = by_name["vllm_kv_policy_pages_freed"]
    assert (value, tags["tier"], tags["engine"]) == (3, "1", "0")
    assert by_name["vllm_kv_policy_compactions"][0] == 2
