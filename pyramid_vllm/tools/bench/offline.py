"""All conversations at once, through an engine whose scheduler is watched."""

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pyramid_vllm.tools.bench.figures import offline_figures
from pyramid_vllm.tools.bench.measure import MeasureTask
from pyramid_vllm.tools.bench.settings import BenchSettings, Side
from pyramid_vllm.tools.bench.store import PREFIX_CACHING, RunResult
from pyramid_vllm.tools.bench.watch import Measured
from pyramid_vllm.tools.bench.workload import Point, Workload
from pyramid_vllm.tools.engine_process import run_child


def offline_task(
    settings: BenchSettings, workload: Workload, point: Point, side: Side
) -> MeasureTask:
    """What one process runs."""
    engine_args = {"enforce_eager": workload.is_cpu}
    if not workload.has_tokenizer:
        engine_args["skip_tokenizer_init"] = True
    return MeasureTask(
        model=settings.model,
        prompts=workload.requests.prompts,
        output_tokens=workload.requests.output_lengths,
        kv_bytes=point.kv_bytes,
        block_size=workload.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_policy=side.policy_json,
        seed=settings.seed,
        dtype=workload.dtype,
        engine_args=engine_args | settings.engine_args,
        warm_up=True,
        later_turns=workload.requests.later_turns,
    )


def measure(task: MeasureTask, advance: Callable[[int], None]) -> Measured:
    """Run a task in a process of its own.

    Raises:
        RuntimeError: the process failed; the message ends with its last lines.
    """
    environment = os.environ | {
        # The child watches its scheduler, so the engine has to be in its process.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "HF_HUB_OFFLINE": "1",
    }
    results: list[Measured] = []

    def hear(message: dict[str, Any]) -> None:
        if "result" in message:
            results.append(Measured(**message["result"]))
        else:
            advance(message.get("done", 0))

    run_child("pyramid_vllm.tools.bench.measure", asdict(task), hear, environment)
    return results[0]


def run_offline(task: MeasureTask, advance: Callable[[int], None]) -> RunResult:
    """Run a task in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    measured = measure(task, advance)
    raw = {
        PREFIX_CACHING: measured.prefix_caching,
        "prompt_lengths": task.prompt_lengths,
        "output_lengths": task.output_lengths,
        "first_token_s": measured.first_token_s,
        "finish_s": measured.finish_s,
    }
    return RunResult(offline_figures(task, measured), raw)
