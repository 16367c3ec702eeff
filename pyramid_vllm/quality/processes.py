"""Runs the engine's process and hears what it says."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pyramid_vllm.quality.jobs import MARK, EngineTask, JobResult


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
    num_results = 0
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "pyramid_vllm.quality.runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
            text=True,
        )
        assert child.stdout is not None
        try:
            _send(child, task)
            for line in child.stdout:
                if not line.startswith(MARK):
                    log.write(line)
                    continue
                message: dict[str, Any] = json.loads(line.removeprefix(MARK))
                if "result" in message:
                    on_result(JobResult.read(message["result"]))
                    num_results += 1
                else:
                    on_progress(message.get("done", 0))
        except BaseException:
            child.kill()
            child.wait()
            raise
        if child.wait() != 0 or num_results != len(task.jobs):
            log.seek(0)
            raise RuntimeError(f"the engine failed:\n{log.read()[-4000:]}")


def _environment() -> dict[str, str]:
    defaults = {
        # Nothing is timed: on a busy machine, threads that spin take each other's turn.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
    }
    # The child looks into its engine, which so has to be in its process.
    return defaults | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _send(child: "subprocess.Popen[str]", task: EngineTask) -> None:
    assert child.stdin is not None
    # A child that is gone already says why in its log.
    with suppress(BrokenPipeError), child.stdin:
        json.dump(asdict(task), child.stdin)
