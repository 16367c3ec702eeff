"""``vllm serve`` in a process of its own, and what it reports of itself."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyramid_vllm.tools.monitor.scrape import Scrape, ScrapeError, fetch, metrics_url

START_UP_S, SAMPLE_INTERVAL_S, METRICS_WITHIN_S = 600.0, 0.25, 30.0


@contextmanager
def serve(model: str, arguments: list[str], log: Path) -> Iterator[str]:
    """A server on loopback, with a process group of its own; its address.

    Raises:
        RuntimeError: it did not start; the message ends with its last lines.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(Path(sys.executable).with_name("vllm"))
    command = [script, "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-uvicorn-access-log", *arguments]
    environment = dict(os.environ)
    # As in operation: the engine core has its own process.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment |= {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_UP_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
        except OSError:
            time.sleep(0.5)
        else:
            return
    tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    raise RuntimeError(f"the server did not start:\n{tail}")


def metric_sum(scrape: Scrape, name: str) -> float:
    """Sum of a figure's series."""
    return sum(scrape.series.get(name, {}).values())


class Sampler:
    """Follows a server's figures while a load runs.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._url = metrics_url(url)
        self._most = 0
        self._preempted = self._num_preemptions()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _num_preemptions(self) -> int:
        now = fetch(self._url, METRICS_WITHIN_S)
        return int(metric_sum(now, "vllm:num_preemptions_total"))

    def _follow(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            with suppress(ScrapeError):
                now = fetch(self._url, METRICS_WITHIN_S)
                running = int(metric_sum(now, "vllm:num_requests_running"))
                self._most = max(self._most, running)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def figures(self) -> dict[str, int]:
        """Most sequences at once in any sample, and preemptions since it was made.

        Raises:
            ScrapeError: the server does not answer.
        """
        preempted = self._num_preemptions() - self._preempted
        return {"max_num_running": self._most, "num_preemptions": preempted}
