"""Runs the engine's process and hears what it says."""

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pyramid_vllm.tools.engine_process import run_child
from pyramid_vllm.tools.quality.jobs import EngineTask, JobResult


def run_engine(
    task: EngineTask,
    on_result: Callable[[JobResult], None],
    on_progress: Callable[[int], None],
) -> None:
    """Run a task in a process of its own.

    Args:
        task: the engine and its jobs.
        on_result: told every job's result as soon as it is there, in order.
        on_progress: told the finished requests.

    Raises:
        RuntimeError: the process failed; the message ends with its last lines.
    """

    def hear(message: dict[str, Any]) -> None:
        if "result" in message:
            on_result(JobResult.read(message["result"]))
        else:
            on_progress(message.get("done", 0))

    module = "pyramid_vllm.tools.quality.runner"
    run_child(module, asdict(task), hear, _environment(), len(task.jobs))


def _environment() -> dict[str, str]:
    defaults = {
        # Nothing is timed: on a busy machine, threads that spin take each other's turn.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
    }
    # The child looks into its engine, which so has to be in its process.
    return defaults | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
