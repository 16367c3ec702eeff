"""``vllm serve`` in a process of its own, and what it reports of itself."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyramid_vllm.tools.monitor.scrape import ScrapeError, fetch, metrics_url

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


def metric(url: str, name: str) -> int:
    """Sum of a figure's series; ``vllm:`` is left out of its name.

    Raises:
        ScrapeError: the server does not answer.
    """
    series = fetch(metrics_url(url), METRICS_WITHIN_S).series
    return int(sum(series.get(f"vllm:{name}", {}).values()))


async def most_running(url: str, load: "asyncio.Task[float]") -> int:
    """Most sequences at once in any sample until a load has ended."""
    most = 0
    while not load.done():
        await asyncio.sleep(SAMPLE_INTERVAL_S)
        with suppress(ScrapeError):
            now = await asyncio.to_thread(metric, url, "num_requests_running")
            most = max(most, now)
    return most


def pages(url: str) -> tuple[float, int]:
    """Pages of the server in use, and all.

    Raises:
        ScrapeError: the server does not answer.
        KeyError: its answer lacks a metric.
    """
    series = fetch(metrics_url(url), METRICS_WITHIN_S).series
    (labels,) = series["vllm:cache_config_info"]
    num_pages = int(dict(labels)["num_gpu_blocks"]) - 1  # one is the null page
    (usage,) = series["vllm:kv_cache_usage_perc"].values()
    return usage * num_pages, num_pages
