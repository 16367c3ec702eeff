"""Overhead of the policy at ``retention=1.0``, where nothing is evicted.

One process a side, each with its engine loaded once; the sides then take turns, round
by round, so that a slower minute of the machine is every side's. Reported are ratios
to stock within a round: median, lowest and highest.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pyramid_vllm.cli.measure import MARK
from pyramid_vllm.cli.model import make_model
from pyramid_vllm.cli.provenance import provenance

BLOCK_SIZE = 32
NUM_SEQS = 8
PROMPT_TOKENS = 64
DECODE_STEPS = 12
SEED = 0
#: Stock vLLM, and stock vLLM once more: what the ratio of equals looks like here.
STOCK = ("stock", "stock again")


def make_engine(model: str, tiers: str) -> Any:
    """A side's engine, in this process, so that its steps can be timed one by one."""
    import pyramid_vllm  # noqa: F401, I001
    from vllm import LLM

    policy: dict[str, Any] = {}
    if tiers not in STOCK:
        config = {"retention": 1.0, "tiers": int(tiers)}
        policy = {"kv_policy": "pyramid", "kv_policy_config": config}
    return LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=512 * 2**20,
        max_model_len=1024,
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=2048,
        seed=SEED,
        **policy,
    ).llm_engine


def time_round(engine: Any) -> dict[str, float]:
    """Tokens/s of one prefill step and of the median decode step behind it."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=DECODE_STEPS + 1, ignore_eos=True, detokenize=False
    )
    for i in range(NUM_SEQS):
        prompt = [(7 * i + j) % 4000 + 5 for j in range(PROMPT_TOKENS)]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    steps = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    prefill, *decode = steps
    assert len(decode) == DECODE_STEPS, "the prompts did not fit into one step"
    return {
        "prefill": NUM_SEQS * PROMPT_TOKENS / prefill,
        "decode": NUM_SEQS / statistics.median(decode),
    }


def serve_rounds(model: str, tiers: str) -> None:
    """A side: load the engine, then time one round for every line read."""
    engine = make_engine(model, tiers)
    time_round(engine)
    print(f"{MARK}ready", flush=True)
    for _ in sys.stdin:
        print(f"{MARK}{json.dumps(time_round(engine))}", flush=True)
    os._exit(0)


class Side:
    """A side's process."""

    def __init__(self, model: str, tiers: str) -> None:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "OMP_NUM_THREADS": str(os.cpu_count() or 1),
            # Idle sides must not spin while another one is timed.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", tiers, "--model", model],
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
        raise RuntimeError("a side ended: run it alone with --side to see why")

    def round(self) -> dict[str, float]:
        """Tokens/s of one round."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        result: dict[str, float] = json.loads(self._read())
        return result

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(
    model: str, tiers: list[str], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Rounds of every side, taking turns."""
    sides = {name: Side(model, name) for name in [*STOCK, *tiers]}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in track(range(rounds), description="rounds"):
        # Every other round backwards, so that no side always follows the same one.
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(sides[name].round())
    for side in sides.values():
        side.close()
    return results


def ratios(
    results: dict[str, list[dict[str, float]]], kind: str
) -> dict[str, list[float]]:
    """A side's tokens/s over stock's, round by round."""
    stock = [figures[kind] for figures in results["stock"]]
    return {
        name: [
            figures[kind] / base for figures, base in zip(rounds, stock, strict=True)
        ]
        for name, rounds in results.items()
    }


def table(results: dict[str, list[dict[str, float]]]) -> Table:
    """Ratios as people read them."""
    made = Table(
        title="tokens/s at retention=1.0, ratio to stock: median (lowest-highest)"
    )
    for column in ("tiers", "decode", "prefill"):
        made.add_column(column, justify="right")
    for name in results:
        cells = []
        for kind in ("decode", "prefill"):
            values = ratios(results, kind)[name]
            cells.append(
                f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"
            )
        made.add_row(name, *cells)
    return made


def main(
    model: Annotated[str | None, typer.Option()] = None,
    tiers: Annotated[str, typer.Option(help="Numbers of tiers.")] = "1,5,10,30",
    rounds: Annotated[int, typer.Option(min=1)] = 40,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the ratios of `retention=1.0` to stock vLLM, by number of tiers."""
    folder = model or str(make_model())
    if side is not None:
        serve_rounds(folder, side)
        return
    results = measure(folder, tiers.split(","), rounds)
    Console().print(table(results))
    if json_file is not None:
        kinds = {kind: ratios(results, kind) for kind in ("decode", "prefill")}
        figures = {"ratio_to_stock": kinds, "tokens_per_s": results}
        report = figures | provenance(SEED)
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
