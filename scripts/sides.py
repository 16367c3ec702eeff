"""Sides of a benchmark: one process each, engine loaded once, timed in turns."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from rich.progress import track

from pyramid_vllm.tools.engine_process import MARK

#: Stock vLLM, and stock vLLM once more: what the ratio of equals looks like here.
STOCK = ("stock", "stock again")


def make_engine(
    model: str, policy: dict[str, Any] | None, seed: int, **settings: Any
) -> Any:
    """A side's engine, in this process, so that its steps can be timed one by one."""
    import pyramid_vllm  # noqa: F401, I001
    from vllm import LLM

    return LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=512 * 2**20,
        seed=seed,
        **settings,
        **(policy or {}),
    ).llm_engine


def serve_rounds(time_round: Callable[[], Any], warm_up: Callable[[], Any]) -> None:
    """Be a side: warm up, then time one round for every line read."""
    time_round()
    print(f"{MARK}ready", flush=True)
    for _ in sys.stdin:
        # While the others had their turn, this process has grown cold.
        warm_up()
        print(f"{MARK}{json.dumps(time_round())}", flush=True)
    os._exit(0)


class Side:
    """A side's process.

    Args:
        arguments: the script and its options that make a process this side.
    """

    def __init__(self, arguments: list[str]) -> None:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "OMP_NUM_THREADS": str(os.cpu_count() or 1),
            # Idle sides must not spin while another one is timed.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK)
        raise RuntimeError(
            f"a side ended; run it alone to see why: {self._process.args}"
        )

    def round(self) -> Any:
        """Figures of one round."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def take_turns(arguments: dict[str, list[str]], rounds: int) -> dict[str, list[Any]]:
    """Rounds of every side, by its name, interleaved."""
    sides = {name: Side(arguments[name]) for name in arguments}
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for number in track(range(rounds), description="rounds"):
        # Every other round backwards, so that no side always follows the same one.
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(sides[name].round())
    for side in sides.values():
        side.close()
    return results
