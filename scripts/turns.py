"""Sides of a benchmark: one process each, engine loaded once, timed in turns.

A slower minute of the machine is then every side's; ratios are taken within a round.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from rich.progress import track

#: Stock vLLM, and stock vLLM once more: the ratio of equals on this machine.
STOCK = ("stock", "stock again")
SEED = 0


@dataclass(frozen=True)
class Side:
    """What one process runs."""

    settings: dict[str, Any]
    """Of ``LLM``, the policy among them."""
    time_round: Callable[[Any], Any]
    """Takes the engine, gives figures."""
    warm_up: Callable[[Any], Any]
    """Runs before each round: during the turns of the others, a process grows cold."""

    def serve(self, connection: Connection) -> None:
        """Be the process: time a round whenever the connection asks for one."""
        import pyramid_vllm  # noqa: F401, I001
        from vllm import LLM

        # In this process, so that its steps can be timed one by one.
        engine = LLM(
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=512 * 2**20,
            block_size=32,
            seed=SEED,
            **self.settings,
        ).llm_engine
        self.time_round(engine)
        connection.send("ready")
        while connection.recv():
            self.warm_up(engine)
            connection.send(self.time_round(engine))
        # vLLM's in-process engine has threads that would not end.
        os._exit(0)


def _start(side: Side) -> Connection:
    """A side's process, when its engine has run once."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=side.serve, args=(theirs,), daemon=True).start()
    theirs.close()
    ours.recv()
    return ours


def step_seconds(engine: Any, prompts: list[list[int]], num_tokens: int) -> list[float]:
    """Seconds of each step that answers some prompts with ``num_tokens`` each."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    seconds = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def take_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[Any]]:
    """Rounds of every side, by its name, interleaved.

    Raises:
        EOFError: a side's process ended; it has written why.
    """
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        # Idle sides must not spin while another one is timed.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    connections = {name: _start(side) for name, side in sides.items()}
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for number in track(range(rounds), description="rounds"):
        # Every other round backwards, so that no side always follows the same one.
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            connections[name].send(True)
            results[name].append(connections[name].recv())
    for connection in connections.values():
        connection.send(False)
    return results


def ratios(rounds: list[Any], stock: list[Any], key: str) -> list[float]:
    """A side's figure over stock's, round by round."""
    return [a[key] / b[key] for a, b in zip(rounds, stock, strict=True)]


def spread(values: list[float], digits: int) -> str:
    """Median, lowest and highest."""
    parts = (statistics.median(values), min(values), max(values))
    median, low, high = (f"{value:.{digits}f}" for value in parts)
    return f"{median} ({low}-{high})"
