"""``vllm serve`` in a process of its own, and what it reports of itself."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyramid_vllm.tools.bench.figures import LOGGED_COMPACTIONS, LOGGED_PAGES
from pyramid_vllm.tools.figures import HIT_RATE
from pyramid_vllm.tools.monitor.scrape import Scrape, ScrapeError, fetch, metrics_url

START_UP_S, SAMPLE_INTERVAL_S, _TIMEOUT_S = 600.0, 0.25, 30.0
#: A line that the policy's scheduler logs after its first compaction.
_ACTIVATION = re.compile(r"(\d+) compactions, (\d+) pages freed")


def vllm_script() -> str:
    """The ``vllm`` command of this Python; ``ValueError`` if there is none."""
    script = Path(sys.executable).with_name("vllm")
    if not script.is_file():
        raise ValueError(f"--workload online needs vLLM's command: {script} is missing")
    return str(script)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings of ``LLM`` as options of ``vllm serve``."""
    words: list[str] = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{name}", text]
    return words


def metric_sum(scrape: Scrape, name: str) -> float:
    """Sum of a figure's series; ``vllm:`` is left out of its name."""
    return sum(scrape.series.get(f"vllm:{name}", {}).values())


def caches_prefixes(scrape: Scrape) -> bool:
    """Whether the engine has its prefix cache on."""
    name = "vllm:cache_config_info"
    return bool(scrape.select(name, {"enable_prefix_caching": "True"}))


def parse_activation(log: str) -> dict[str, float]:
    """Compactions and freed pages, as last logged: at least that many."""
    found = _ACTIVATION.findall(log)
    compactions, freed = found[-1] if found else (0, 0)
    return {LOGGED_COMPACTIONS: int(compactions), LOGGED_PAGES: int(freed)}


def complete(url: str, model: str, prompt_ids: list[int], num_tokens: int) -> None:
    """Let a server answer one prompt, greedily and in full."""
    body = {"model": model, "prompt": prompt_ids, "max_tokens": num_tokens}
    body |= {"temperature": 0, "ignore_eos": True}
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", data, kind)
    with urllib.request.urlopen(request, timeout=START_UP_S) as response:
        response.read()


@contextmanager
def serve(model: str, arguments: list[str], log: Path) -> Iterator[str]:
    """A server on loopback, with a process group of its own; its address.

    Raises:
        RuntimeError: it did not start; the message ends with its last lines.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [vllm_script(), "serve", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disable-uvicorn-access-log", *arguments]
    environment = dict(os.environ)
    # As in operation: the engine core has its own process; activation is logged.
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
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise RuntimeError(f"the server did not start:\n{tail(log)}")


def tail(log: Path) -> str:
    """A log's last lines."""
    return log.read_text(encoding="utf-8", errors="replace")[-4000:]


class Sampler:
    """Follows a server's figures while a load runs.

    Args:
        url: of the server.
        advance: called with the number of finished requests at every sample.
    """

    def __init__(self, url: str, advance: Callable[[int], None]) -> None:
        self._url, self._advance = metrics_url(url), advance
        self._running: list[float] = []
        self._before = fetch(self._url, _TIMEOUT_S)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    @property
    def is_caching(self) -> bool:
        """Whether the server had its prefix cache on."""
        return caches_prefixes(self._before)

    def _follow(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            with suppress(ScrapeError):
                now = fetch(self._url, _TIMEOUT_S)
                self._running.append(metric_sum(now, "num_requests_running"))
                self._advance(int(self._since(now, "request_success_total")))

    def _since(self, now: Scrape, name: str) -> float:
        return metric_sum(now, name) - metric_sum(self._before, name)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def figures(self) -> dict[str, float]:
        """Sequences at once, where any ran, preemptions and prefix cache hits."""
        busy = [count for count in self._running if count]
        now = fetch(self._url, _TIMEOUT_S)
        queries = self._since(now, "prefix_cache_queries_total")
        hits = self._since(now, "prefix_cache_hits_total")
        return {
            "max_num_running": max(busy, default=0.0),
            "mean_num_running": sum(busy) / max(1, len(busy)),
            "num_preemptions": self._since(now, "num_preemptions_total"),
            HIT_RATE: hits / max(1, queries),
        }
