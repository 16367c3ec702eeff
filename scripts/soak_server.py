"""A server of the soak test, and what both sides' servers share."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from soak_load import MAX_MODEL_LEN, LoadRequest, draw_requests

MODEL_NAME = "model"
BLOCK_SIZE = 32
MAX_NUM_SEQS = 64
#: Shorter than most prompts, so that these come in chunks.
MAX_CHUNK = 256
START_UP_S = 300


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers.

    Raises:
        RuntimeError: it ended, or takes too long.
    """
    deadline = time.monotonic() + START_UP_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise RuntimeError(f"the server did not start; exit status {process.poll()}")


@contextmanager
def serve(model: str, arguments: list[str], log: Path) -> Iterator[str]:
    """A server of its own process group, on loopback; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--disable-uvicorn-access-log", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1"},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, process)
        yield url
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class Settings:
    """What both sides share."""

    model: str
    minutes: float
    rate_factor: float
    abort_share: float
    stock_sequences: int
    seed: int
    vocab_size: int
    kv_bytes: int

    def arguments(self) -> list[str]:
        """Options of `vllm serve`."""
        options = {
            "served-model-name": MODEL_NAME,
            "dtype": "float32",
            "block-size": BLOCK_SIZE,
            "max-model-len": MAX_MODEL_LEN,
            "max-num-seqs": MAX_NUM_SEQS,
            "max-num-batched-tokens": MAX_CHUNK,
            "kv-cache-memory-bytes": self.kv_bytes,
            "seed": self.seed,
        }
        pairs = (("--" + name, str(value)) for name, value in options.items())
        return ["--enforce-eager", *(word for pair in pairs for word in pair)]

    def requests(self, seed: int, rate: float, seconds: float) -> Iterator[LoadRequest]:
        """Requests of this load."""
        return draw_requests(seed, rate, seconds, self.vocab_size, self.abort_share)
