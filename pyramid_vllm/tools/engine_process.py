"""Jobs with an engine run in their own process: they get a task and send messages.

A job is a function ``job(task, send)``, named ``module:function``. The task is JSON on
the process's standard input. Messages are JSON objects of one key, each on a line that
starts with ``MARK``: ``done`` is the number of finished requests, ``result`` a
result of the job, ``error`` the reason why the engine refuses a policy.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import IO, Any, NoReturn

#: Environment of jobs that are not timed: on a busy machine, threads that spin slow
#: each other down.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
#: Starts the lines that are messages.
MARK = "@pyramid-vllm "


def run_job(
    job: str,
    task: Mapping[str, Any],
    on_result: Callable[[Any], None],
    on_progress: Callable[[int], None] = lambda done: None,
    environment: Mapping[str, str] | None = None,
    num_results: int = 1,
) -> None:
    """Run a job in a process, which has ended when this returns or raises.

    Args:
        job: ``module:function``.
        task: as JSON can hold it.
        on_result: called with each result as soon as it is there.
        on_progress: called with the number of finished requests.
        environment: variables that replace those of this process.
        num_results: how many results the job sends.

    Raises:
        KVPolicyError: the engine refused the policy.
        RuntimeError: the process failed; the message ends with its last lines.
    """
    found = {
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        **os.environ,
        # Jobs look into their engine, so it has to be in their process.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **(environment or {}),
    }

    def receive(message: dict[str, Any]) -> None:
        if "error" in message:
            # Imported here: scripts start children where policies cannot be imported.
            from pyramid_vllm.policy import KVPolicyError

            raise KVPolicyError(message["error"])
        if "result" in message:
            on_result(message["result"])
        elif "done" in message:
            on_progress(message["done"])

    run_child(__name__, task, receive, found, num_results, (job,))


def run_child(
    module: str,
    task: Mapping[str, Any],
    on_message: Callable[[dict[str, Any]], None],
    environment: Mapping[str, str],
    num_results: int = 1,
    arguments: tuple[str, ...] = (),
    timeout: float | None = None,
) -> None:
    """Run ``python -m module arguments``, and pass on each message as it comes; the
    other arguments and errors are those of ``run_job``.

    Args:
        timeout: seconds after which the process is killed; None: never.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
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
            assert child.stdin is not None
            # A child that has already ended has its reason in the log.
            with suppress(BrokenPipeError), child.stdin:
                json.dump(task, child.stdin)
            found = _receive(child, log, on_message)
        except BaseException:
            child.kill()
            raise
        finally:
            is_late = timer.finished.is_set()
            timer.cancel()
        status = child.wait()
        if status != 0 or found != num_results:
            log.seek(0)
            how = f"ran longer than {timeout:g} s" if is_late else "failed"
            why = f"the engine {how}, exit status {status}"
            raise RuntimeError(f"{why}:\n{log.read()[-4000:]}")


def _receive(
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
    """Read the task of this process."""
    task: dict[str, Any] = json.load(sys.stdin)
    return task


def tell(kind: str, value: Any) -> None:
    """Send a message from this process."""
    print(f"{MARK}{json.dumps({kind: value})}", flush=True)


def leave() -> NoReturn:
    """End this process after everything is sent."""
    sys.stdout.flush()
    # vLLM's in-process engine leaves threads running; nothing is left to save.
    os._exit(0)


def main(job: str) -> None:
    """Run the job with the task of this process."""
    from pyramid_vllm.policy import KVPolicyError

    module, _, name = job.partition(":")
    try:
        getattr(import_module(module), name)(read_task(), tell)
    except KVPolicyError as error:
        tell("error", str(error))
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
