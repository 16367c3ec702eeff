"""Figures of one run, the same for both workloads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.measure import MeasureTask
from pyramid_vllm.tools.bench.watch import Measured

PERCENTILES = (50, 95, 99)
#: Servers log what they have done only every few seconds.
LOGGED_COMPACTIONS = "num_compactions_logged"
LOGGED_PAGES = "num_pages_freed_logged"
#: Prompt tokens that the prefix cache had, of all prompt tokens.
HIT_RATE = "prefix_hit_rate"
Figures = dict[str, float]


def side_label(policy: str) -> str:
    """What tables and plots call a side of this policy."""
    return "stock vLLM" if policy == NONE else policy


@dataclass(frozen=True)
class Metric:
    """A figure, and how people read it."""

    key: str
    label: str
    format: str = ",.0f"
    factor: float = 1.0


def _latencies(key: str, label: str) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"{key}_p{p}_s", f"{label} p{p}, ms", ",.0f", 1e3) for p in PERCENTILES
    )


METRICS = (
    Metric("total_tokens_per_s", "tokens/s, prompt and output", ",.1f"),
    Metric("output_tokens_per_s", "output tokens/s", ",.1f"),
    Metric("requests_per_s", "requests/s", ".3f"),
    *_latencies("ttft", "time to first token"),
    *_latencies("tpot", "time per output token"),
    *_latencies("e2e", "end to end"),
    Metric("max_num_running", "most sequences at once"),
    Metric("mean_num_running", "mean sequences at once", ".1f"),
    Metric("num_preemptions", "preemptions"),
    Metric("kv_bytes_per_request", "KV bytes a request"),
    Metric("num_rows_computed", "rows computed a layer"),
    Metric("num_prompt_tokens_computed", "prompt tokens computed"),
    Metric(HIT_RATE, "prompt tokens from the prefix cache", ".1%"),
    Metric("num_compactions", "compactions"),
    Metric("num_pages_freed", "pages freed by eviction"),
    Metric(LOGGED_COMPACTIONS, "compactions, at least"),
    Metric(LOGGED_PAGES, "pages freed by eviction, at least"),
)


def latencies(key: str, seconds: Sequence[float]) -> Figures:
    """Percentiles of one kind of latency."""
    values = np.percentile(seconds, PERCENTILES).tolist()
    return {
        f"{key}_p{p}_s": value for p, value in zip(PERCENTILES, values, strict=True)
    }


def offline_figures(task: MeasureTask, measured: Measured) -> Figures:
    """Figures of a batch."""
    first, finish = np.array(measured.first_token_s), np.array(measured.finish_s)
    outputs = np.array(task.output_lengths)
    return {
        "seconds": measured.seconds,
        "total_tokens_per_s": measured.total_tokens_per_s,
        "output_tokens_per_s": float(outputs.sum()) / measured.seconds,
        "requests_per_s": len(outputs) / measured.seconds,
        **latencies("ttft", measured.first_token_s),
        **latencies("tpot", ((finish - first) / (outputs - 1)).tolist()),
        **latencies("e2e", measured.finish_s),
        "max_num_running": measured.max_num_running,
        "mean_num_running": measured.mean_num_running,
        "num_preemptions": measured.num_preemptions,
        "kv_bytes_per_request": measured.kv_bytes_per_request,
        "num_rows_scheduled": measured.num_rows_scheduled,
        "num_rows_computed": measured.num_rows_computed,
        "num_prompt_tokens_computed": measured.num_prompt_tokens_computed,
        HIT_RATE: measured.prefix_hit_rate,
        "num_compactions": measured.num_compactions,
        "num_pages_freed": measured.num_pages_freed,
    }


def online_figures(result: dict[str, Any], server: Figures) -> Figures:
    """Figures of a load.

    Args:
        result: what ``vllm bench serve`` saved.
        server: the server's own figures.

    Raises:
        RuntimeError: not every request was answered, or a figure is missing.
    """
    if result.get("failed", 0) or result["completed"] != result["num_prompts"]:
        errors = sorted({error for error in result.get("errors", []) if error})
        raise RuntimeError(
            f"{result['completed']} of {result['num_prompts']} requests were answered: "
            f"{'; '.join(errors)[:500]}"
        )
    figures = {
        "seconds": result["duration"],
        "total_tokens_per_s": result["total_token_throughput"],
        "output_tokens_per_s": result["output_throughput"],
        "requests_per_s": result["request_throughput"],
    }
    for key, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("e2e", "e2el")):
        for p in PERCENTILES:
            name = f"p{p}_{theirs}_ms"
            if name not in result:
                raise RuntimeError(f"vllm bench serve reports no {name}")
            figures[f"{key}_p{p}_s"] = result[name] / 1e3
    return figures | server


def check_activation(name: str, figures: Figures) -> None:
    """Refuse figures of a policy that should have evicted and did nothing.

    Raises:
        RuntimeError: these figures would compare stock vLLM with itself.
    """
    pruned = figures.get("num_rows_scheduled", 0) - figures.get("num_rows_computed", 0)
    compactions = figures.get("num_compactions") or figures.get(LOGGED_COMPACTIONS)
    if not compactions and pruned <= 0:
        raise RuntimeError(
            f"policy '{name}' keeps less than all of these prompts, but neither "
            "compacted nor pruned any: its figures would be stock vLLM's"
        )
