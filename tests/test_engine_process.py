"""What happens to a process that gets a task."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.tools.engine_process import MARK, run_child, run_job

#: More than a pipe holds.
LONG = {"prompts": [0] * 100_000}

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that the test writes and that runs in place of Python."""
    file = tmp_path / "child"
    file.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    return file


def test_a_child_that_reads_no_task_says_why(script: Path) -> None:
    script.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    with pytest.raises(RuntimeError, match="failed, exit status 3:\nout of luck"):
        run_child("any", LONG, print, os.environ)


def test_a_child_that_takes_too_long_is_killed(script: Path) -> None:
    script.write_text("#!/bin/sh\ncat >/dev/null\necho working >&2\nexec sleep 300\n")
    with pytest.raises(RuntimeError, match=r"longer than 0\.5 s.*-9:\nworking"):
        run_child("any", LONG, print, os.environ, timeout=0.5)


def test_a_child_that_tells_less_than_asked_has_failed(script: Path) -> None:
    script.write_text(
        f"#!/bin/sh\ncat >/dev/null\necho so far so good\n"
        f"""echo '{MARK}{{"done": 1}}'\necho '{MARK}{{"result": 2}}'\n"""
    )
    told: list[dict[str, Any]] = []
    run_child("any", LONG, told.append, os.environ)
    assert told == [{"done": 1}, {"result": 2}]
    with pytest.raises(RuntimeError, match="so far so good"):
        run_child("any", LONG, told.append, os.environ, num_results=2)


def test_an_interrupt_leaves_no_child(script: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script.write_text(
        f"#!/bin/sh\ncat >/dev/null\necho $$ >{pid}\n"
        f"""echo '{MARK}{{"done": 1}}'\nexec sleep 300\n"""
    )

    def interrupt(message: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child("any", LONG, interrupt, os.environ)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def job(task: dict[str, Any], send: Callable[[str, Any], None]) -> None:
    """Runs in the child."""
    send("done", 1)
    if task["refuse"]:
        raise KVPolicyError(task["refuse"])
    send("result", task)


def test_a_jobs_messages_reach_whom_they_are_meant_for() -> None:
    name, task = "tests.test_engine_process:job", {"refuse": ""}
    results: list[Any] = []
    finished: list[int] = []
    run_job(name, task, results.append, finished.append)
    assert (results, finished) == ([task], [1])
    with pytest.raises(KVPolicyError, match="not with this model"):
        run_job(name, {"refuse": "not with this model"}, results.append)
    with pytest.raises(RuntimeError, match="no_such"):
        run_job("tests.test_engine_process:no_such", task, results.append)
    assert results == [task]
