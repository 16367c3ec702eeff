"""Figures of a simulated run."""

import numpy as np

from pyramid_vllm.tools.figures import HIT_RATE, Figures, Metric, latencies
from pyramid_vllm.tools.simulate.run import Simulation

METRICS = (
    Metric("seconds", "seconds", ",.1f"),
    Metric("tokens_per_s", "tokens/s, prompt and output"),
    Metric("requests_per_s", "requests/s", ".3f"),
    Metric("ttft_p50_s", "time to first token p50, s", ",.2f"),
    Metric("ttft_p99_s", "time to first token p99, s", ",.2f"),
    Metric("tpot_p50_s", "time per output token p50, ms", ",.1f", 1e3),
    Metric("tpot_p99_s", "time per output token p99, ms", ",.1f", 1e3),
    Metric("max_num_running", "most sequences at once"),
    Metric("mean_num_running", "mean sequences at once", ",.1f"),
    Metric("num_preemptions", "preemptions"),
    Metric(HIT_RATE, "prefix hit rate", ".1%"),
    Metric("num_prompt_tokens_computed", "prompt tokens computed"),
    Metric("num_compactions", "compactions"),
    Metric("pages_running", "KV pages held by requests, mean", ".1%"),
    Metric("pages_cached", "KV pages of the prefix cache alone, mean", ".1%"),
    Metric("pages_free", "KV pages free, mean", ".1%"),
    Metric("num_steps", "steps"),
    Metric("cpu_ms_per_step", "scheduler's CPU time a step, ms", ",.2f"),
    Metric("wall_s", "seconds that the simulation took", ",.1f"),
)
_PERCENTILES = (50, 99)


def run_figures(run: Simulation) -> Figures:
    """All figures of a run, every request of which has ended."""
    requests, steps = list(run.requests.values()), run.steps
    end = max(request.finish for request in requests)
    seconds = end - min(request.arrival for request in requests)
    prompts = sum(request.num_prompt_tokens for request in requests)
    outputs = sum(request.num_outputs for request in requests)
    ttfts = [request.first_token - request.arrival for request in requests]
    tpots = [
        (request.finish - request.first_token) / (request.num_outputs - 1)
        for request in requests
        if request.num_outputs > 1
    ]
    durations = np.array([step.seconds for step in steps])
    running = np.array([step.num_running for step in steps])
    _, in_use, cached, free = np.mean(run.pages, axis=0).tolist()
    return {
        "seconds": seconds,
        "tokens_per_s": (prompts + outputs) / seconds,
        "requests_per_s": len(requests) / seconds,
        **latencies("ttft", ttfts, _PERCENTILES),
        **latencies("tpot", tpots, _PERCENTILES),
        "max_num_running": int(running.max()),
        "mean_num_running": float(running @ durations / durations.sum()),
        "num_preemptions": run.num_preemptions,
        HIT_RATE: sum(r.num_cached_tokens for r in requests) / prompts,
        "num_prompt_tokens_computed": run.num_prompt_tokens_computed,
        "num_compactions": run.num_compactions,
        "pages_running": in_use,
        "pages_cached": cached,
        "pages_free": free,
        "num_requests": len(requests),
        "num_steps": len(steps),
        "cpu_ms_per_step": 1e3 * sum(step.cpu_s for step in steps) / len(steps),
        "wall_s": run.wall_s,
    }
