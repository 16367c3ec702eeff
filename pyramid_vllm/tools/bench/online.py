"""A server, and vLLM's own client of ``vllm bench serve``, which gets our requests."""

import asyncio
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyramid_vllm.tools.bench.figures import online_figures
from pyramid_vllm.tools.bench.server import (
    Sampler,
    as_flags,
    complete,
    parse_activation,
    serve,
)
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.bench.workload import Point, Workload, engine_args
from pyramid_vllm.tools.engine_process import run_job
from pyramid_vllm.tools.figures import PERCENTILES, Figures
from pyramid_vllm.tools.sides import Side

_RAW = ("start_times", "ttfts", "itls", "input_lens", "output_lens")


@dataclass(frozen=True)
class OnlineTask:
    """The server and the load of one run."""

    model: str
    engine_args: dict[str, Any]
    prompts: list[list[int]]
    output_lengths: list[int]
    request_rate: float | None
    """Requests a second; None: all at once."""
    seed: int
    """Seed of the times between requests."""


def online_task(
    settings: BenchSettings, workload: Workload, point: Point, side: Side
) -> OnlineTask:
    """The task of one run."""
    (prompts,) = workload.requests.turns
    return OnlineTask(
        model=str(settings.model),
        engine_args=engine_args(settings, workload, point, side),
        prompts=prompts,
        output_lengths=workload.requests.output_lengths,
        request_rate=point.request_rate,
        seed=settings.seed,
    )


def run_online(
    task: OnlineTask, advance: Callable[[int], None]
) -> tuple[Figures, dict[str, Any]]:
    """Start a server, put the load on it, read both sides' figures.

    Returns:
        The figures, and those of each request as the client has them.

    Raises:
        RuntimeError: the server or the client failed, or a request did.
    """
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with serve(task.model, as_flags(task.engine_args), log) as url:
            # No request begins with this prompt of one token, repeated. The second
            # time, its pages come from the prefix cache where that is on.
            for _ in range(2):
                complete(url, task.model, [0] * min(map(len, task.prompts)), 2)
            with Sampler(url, advance) as sampler:
                load = asdict(task) | {"url": url}
                run_job(f"{__name__}:send_load", load, results.append)
            server = sampler.figures()
        text = log.read_text(encoding="utf-8", errors="replace")
    (result,) = results
    raw = {key: result[key] for key in _RAW if key in result}
    raw["prefix_caching"] = sampler.is_caching
    return online_figures(result, server | parse_activation(text)), raw


def send_load(task: dict[str, Any], send: Callable[[str, Any], None]) -> None:
    """Send an ``OnlineTask``'s requests to ``url``, from this process."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark
    from vllm.tokenizers import get_tokenizer

    # The client draws the times between requests from these.
    random.seed(task["seed"])
    np.random.seed(task["seed"])
    pairs = zip(task["prompts"], task["output_lengths"], strict=True)
    requests = [SampleRequest(prompt, len(prompt), length) for prompt, length in pairs]
    running = benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="vllm",
        api_url=f"{task['url']}/v1/completions",
        base_url=task["url"],
        model_id=task["model"],
        model_name=task["model"],
        tokenizer=get_tokenizer(task["model"]),
        input_requests=requests,
        logprobs=None,
        request_rate=task["request_rate"] or float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        # Its warm-up sends the first prompt, which the prefix cache would keep.
        num_warmups=0,
        ready_check_timeout_sec=0,
        profile=False,
        selected_percentile_metrics=["ttft", "tpot", "e2el"],
        selected_percentiles=[float(p) for p in PERCENTILES],
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=None,
        lora_modules=None,
        extra_headers=None,
        extra_body={"temperature": 0.0},
    )
    result = asyncio.run(running)
    figures = {
        key: value
        for key, value in result.items()
        if key in (*_RAW, "errors") or isinstance(value, int | float)
    }
    send("result", figures | {"num_prompts": len(requests)})
