"""Figures of runs, and what repeats make of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.measure import MeasureTask
from pyramid_vllm.tools.bench.watch import Measured
from pyramid_vllm.tools.figures import (
    HIT_RATE,
    PERCENTILES,
    Figures,
    Metric,
    latencies,
)

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "e2e": "end to end",
}
METRICS = (
    Metric("total_tokens_per_s", "tokens/s, prompt and output", ",.1f"),
    Metric("output_tokens_per_s", "output tokens/s", ",.1f"),
    Metric("requests_per_s", "requests/s", ".3f"),
    *(
        Metric(f"{key}_p{p}_s", f"{label} p{p}, ms", ",.0f", 1e3)
        for key, label in LATENCIES.items()
        for p in PERCENTILES
    ),
    Metric("max_num_running", "most sequences at once"),
    Metric("mean_num_running", "mean sequences at once", ".1f"),
    Metric("num_preemptions", "preemptions"),
    Metric("kv_bytes_per_request", "KV bytes a request"),
    Metric("num_rows_computed", "rows computed a layer"),
    Metric("num_prompt_tokens_computed", "prompt tokens computed"),
    Metric(HIT_RATE, "prompt tokens from the prefix cache", ".1%"),
    Metric("num_compactions", "compactions"),
    Metric("num_kept_whole", "prompts kept whole for a shared prefix"),
    Metric("num_pages_freed", "pages freed by eviction"),
)

#: Spread of each figure over repeats, and of its ratio to stock.
Summary = dict[str, dict[str, Any]]


def batch_figures(task: MeasureTask, measured: Measured) -> Figures:
    """Figures of a batch."""
    first, finish = np.array(measured.first_token_s), np.array(measured.finish_s)
    outputs = np.array(task.output_lengths)
    numbers = {k: v for k, v in vars(measured).items() if type(v) in (int, float)}
    return {
        **numbers,
        "output_tokens_per_s": float(outputs.sum()) / measured.seconds,
        "requests_per_s": len(outputs) / measured.seconds,
        **latencies("ttft", measured.first_token_s),
        **latencies("tpot", ((finish - first) / (outputs - 1)).tolist()),
        **latencies("e2e", measured.finish_s),
    }


def check_activation(name: str, figures: Figures) -> None:
    """Refuse figures of a policy that should have evicted and did nothing.

    Raises:
        RuntimeError: these figures would compare stock vLLM with itself.
    """
    pruned = figures["num_rows_scheduled"] - figures["num_rows_computed"]
    is_idle = not (figures["num_compactions"] or figures["num_kept_whole"])
    if is_idle and pruned <= 0:
        raise RuntimeError(
            f"policy '{name}' keeps less than all of these prompts, but neither "
            "compacted nor pruned any: its figures would be stock vLLM's"
        )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range."""
    return {
        "median": float(np.median(values)),
        "min": float(min(values)),
        "max": float(max(values)),
        "values": list(values),
    }


def summarize(sides: Mapping[str, Sequence[Figures]]) -> dict[str, Summary]:
    """Of every side and figure: its spread, and that of its ratios to stock within
    each repeat; None where stock has zeros.

    Args:
        sides: by side, stock vLLM among them, the figures of each repeat.
    """
    summary: dict[str, Summary] = {}
    for name, runs in sides.items():
        summary[name] = {}
        for key in runs[0]:
            ours = [run[key] for run in runs]
            stock = [run[key] for run in sides[NONE]]
            ratio = None
            if all(stock):
                ratio = spread([a / b for a, b in zip(ours, stock, strict=True)])
            summary[name][key] = spread(ours) | {"ratio": ratio}
    return summary


def memory_binds(fits: bool, num_at_once: int, stock: Sequence[Figures]) -> bool:
    """Whether memory keeps stock vLLM from running all that it could at once.

    Args:
        fits: whether all of it fits at its full length.
        num_at_once: the requests that may run at once.
        stock: figures of its runs.
    """
    ran_all = all(
        run["max_num_running"] >= num_at_once and not run["num_preemptions"]
        for run in stock
    )
    return not (fits or ran_all)
