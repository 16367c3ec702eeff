"""An engine in a process of its own, which gets a task and tells what it finds.

The task is JSON on its standard input. What it tells are JSON objects of one key, each
on a line of its own behind ``MARK``; ``result`` is the key of what it is run for.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any, NoReturn

#: Starts the lines that are messages.
MARK = "@pyramid-vllm "


def run_child(
    module: str,
    task: Mapping[str, Any],
    on_message: Callable[[dict[str, Any]], None],
    environment: Mapping[str, str],
    num_results: int = 1,
    timeout: float | None = None,
) -> None:
    """Run a module with a task; the process is gone when this returns or raises.

    Args:
        module: run as ``python -m``.
        task: as JSON can hold it.
        on_message: told every message as soon as it is there.
        environment: of the process.
        num_results: how many results it is to tell.
        timeout: seconds after which the process is killed; None: never.

    Raises:
        RuntimeError: the process failed or was killed; it ends with its last lines.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        ) as child,
    ):
        timer = threading.Timer(timeout or 0, child.kill)
        if timeout is not None:
            timer.start()
        try:
            _send(child, task)
            num_told = _hear(child, log, on_message)
        except BaseException:
            child.kill()
            raise
        finally:
            is_late = timer.finished.is_set()
            timer.cancel()
        status = child.wait()
        if status != 0 or num_told != num_results:
            log.seek(0)
            how = f"ran longer than {timeout:g} s" if is_late else "failed"
            why = f"the engine {how}, exit status {status}"
            raise RuntimeError(f"{why}:\n{log.read()[-4000:]}")


def _send(child: "subprocess.Popen[str]", task: Mapping[str, Any]) -> None:
    assert child.stdin is not None
    # A child that is gone already says why in its log.
    with suppress(BrokenPipeError), child.stdin:
        json.dump(task, child.stdin)


def _hear(
    child: "subprocess.Popen[str]",
    log: IO[str],
    on_message: Callable[[dict[str, Any]], None],
) -> int:
    """Pass messages on, and count the results among them; other lines are logged."""
    assert child.stdout is not None
    num_results = 0
    for line in child.stdout:
        if not line.startswith(MARK):
            log.write(line)
            continue
        message: dict[str, Any] = json.loads(line.removeprefix(MARK))
        on_message(message)
        num_results += "result" in message
    return num_results


def read_task() -> dict[str, Any]:
    """In the process: its task."""
    task: dict[str, Any] = json.load(sys.stdin)
    return task


def tell(kind: str, value: Any) -> None:
    """In the process: print a message."""
    print(f"{MARK}{json.dumps({kind: value})}", flush=True)


def leave() -> NoReturn:
    """In the process: end it, all being told."""
    sys.stdout.flush()
    # vLLM's in-process engine leaves threads behind; nothing is left to save.
    os._exit(0)
