"""``vllm serve`` in a process of its own, and what it reports of itself."""

import json
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
from typing import Any

from pyramid_vllm.tools.monitor.scrape import ScrapeError, fetch, metrics_url

START_UP_S, SAMPLE_INTERVAL_S, _TIMEOUT_S = 600.0, 0.25, 30.0


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings of ``LLM`` as options of ``vllm serve``; what is true has no value."""
    words: list[str] = []
    for key, value in settings.items():
        words.append(f"--{key.replace('_', '-')}")
        if value is not True:
            words.append(value if isinstance(value, str) else json.dumps(value))
    return words


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


class Sampler:
    """Follows a server's figures while a load runs."""

    def __init__(self, url: str) -> None:
        self._url, self._most = metrics_url(url), 0
        self._preempted = self._sum("num_preemptions_total")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _sum(self, name: str) -> int:
        """Sum of a figure's series; ``ScrapeError`` if the server does not answer."""
        series = fetch(self._url, _TIMEOUT_S).series.get(f"vllm:{name}", {})
        return int(sum(series.values()))

    def _follow(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            with suppress(ScrapeError):
                self._most = max(self._most, self._sum("num_requests_running"))

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def figures(self) -> dict[str, int]:
        """Most sequences at once in any sample, and preemptions.

        Raises:
            ScrapeError: the server does not answer.
        """
        preempted = self._sum("num_preemptions_total") - self._preempted
        return {"max_num_running": self._most, "num_preemptions": preempted}
