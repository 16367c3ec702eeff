"""Ray clusters that nothing outside of the test can see.

Ray listens on every interface, whatever address its node is given. So each cluster runs
in a network namespace of its own that has nothing but loopback, and so does everything
that talks to it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
HEAD = "127.0.0.1"
ADDRESS = f"{HEAD}:6379"
#: How long Ray's processes have to end by themselves.
_GRACE_S = 5.0


@dataclass(frozen=True)
class RayCluster:
    """A running cluster."""

    namespace: str
    environment: Mapping[str, str]
    """Of drivers: finds the cluster, imports the package and the tests."""

    def popen(self, command: list[str], **settings: Any) -> subprocess.Popen[Any]:
        """Start a process beside the cluster; it ends with the cluster at the latest.

        Args:
            command: what to run.
            settings: of ``subprocess.Popen``; ``env`` is added to the cluster's.
        """
        env = {**self.environment, **settings.pop("env", {})}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command], env=env, **settings
        )

    def run_json(self, script: Path, argument: Any, timeout: float) -> Any:
        """Run a Python script that reads JSON and writes a line of it after an "@".

        Raises:
            AssertionError: it did not; says what it wrote instead.
        """
        process = self.popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(json.dumps(argument), timeout=timeout)
        finally:
            process.kill()
        lines = [line for line in out.splitlines() if line.startswith("@")]
        assert lines, f"no result:\n{out[-2000:]}\n{err[-6000:]}"
        return json.loads(lines[-1][1:])


@contextmanager
def ray_cluster(
    num_nodes: int = 2,
    num_cpus: int = 1,
    num_gpus: int = 1,
    env: Mapping[str, str] | None = None,
) -> Iterator[RayCluster]:
    """Nodes on 127.0.0.1, 127.0.0.2 and so on, all of which end with the context.

    Args:
        num_nodes: of them, the first is the head.
        num_cpus: logical CPUs of each.
        num_gpus: logical GPUs of each, on whatever hardware.
        env: added to the environment of nodes, and so of Ray's workers, and of drivers.
    """
    environment = _environment() | dict(env or {})
    with _namespace() as namespace, _short_folder() as folder:
        try:
            for index in range(num_nodes):
                _start_node(namespace, folder, index, (num_cpus, num_gpus), environment)
            yield RayCluster(
                namespace,
                environment | {"RAY_ADDRESS": ADDRESS, "VLLM_HOST_IP": HEAD},
            )
        finally:
            _end_processes(namespace)


def _environment() -> dict[str, str]:
    # What the tests set for engines of their own process is not for these.
    engines = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
    engines += ("TRITON_INTERPRET", "RAY_ADDRESS")
    inherited = {k: v for k, v in os.environ.items() if k not in engines}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "GLOO_SOCKET_IFNAME": "lo",
        # Else vLLM has a token written into the home folder, which nodes do not know.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's default is to let all others go first: beside other tests, for minutes.
        "RAY_worker_niceness": "0",
        # The machine's memory is not the test's alone.
        "RAY_memory_monitor_refresh_ms": "0",
    }


@contextmanager
def _namespace() -> Iterator[str]:
    """A new network namespace with loopback alone; skips the test where none can be."""
    name = f"pyramid-{os.getpid()}-{time.monotonic_ns()}"
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command, so no network namespace for Ray")
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if added.returncode:
        pytest.skip(f"no network namespace for Ray: {added.stderr.strip()}")
    try:
        subprocess.run(
            ["ip", "netns", "exec", name, "ip", "link", "set", "lo", "up"], check=True
        )
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@contextmanager
def _short_folder() -> Iterator[str]:
    """A folder with a short path: Ray's sockets need less than 108 characters, and
    pytest's paths are longer."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_node(
    namespace: str,
    folder: str,
    index: int,
    resources: tuple[int, int],
    environment: Mapping[str, str],
) -> None:
    address = f"127.0.0.{index + 1}"
    where = ["--head", "--port=6379", "--include-dashboard=false"]
    if index:
        where = [f"--address={ADDRESS}"]
    command = ["ip", "netns", "exec", namespace, RAY, "start", *where]
    command += [f"--node-ip-address={address}", f"--temp-dir={folder}"]
    command += [f"--num-cpus={resources[0]}", f"--num-gpus={resources[1]}"]
    command += [f"--object-store-memory={100 * 2**20}", "--disable-usage-stats"]
    started = subprocess.run(
        command,
        env={**environment, "VLLM_HOST_IP": address},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert started.returncode == 0, started.stdout + started.stderr


def _end_processes(namespace: str) -> None:
    """End everything in the namespace, which is all that the cluster has started."""
    deadline = time.monotonic() + _GRACE_S
    asked: set[int] = set()
    while pids := _pids(namespace):
        is_late = time.monotonic() > deadline
        for pid in pids if is_late else pids - asked:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if is_late else signal.SIGTERM)
        asked |= pids
        time.sleep(0.1)


def _pids(namespace: str) -> set[int]:
    listed = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True
    )
    return {int(pid) for pid in listed.stdout.split()}
