"""The processes of a test's Ray cluster, found and killed from outside."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.ray_cluster import RayCluster


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until a condition holds.

    Raises:
        AssertionError: it does not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {seconds:g} s"
        time.sleep(0.2)


def pid_of(cluster: RayCluster, title: str) -> int:
    """The one process whose title, which Ray sets, starts with these words."""
    listed = subprocess.run(
        ["ip", "netns", "pids", cluster.namespace],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    (pid,) = (
        pid for pid in map(int, listed.stdout.split()) if _title(pid).startswith(title)
    )
    return pid


def kill_with_children(pid: int) -> None:
    """Kill an actor and the engine that it started, as the loss of a machine would."""
    for victim in (pid, *_descendants(pid)):
        os.kill(victim, signal.SIGKILL)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:  # it has ended meanwhile
        return ""


def _descendants(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    children = [int(child) for child in text.split()]
    return children + [below for child in children for below in _descendants(child)]
