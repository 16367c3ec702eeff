"""Overhead of the policy at ``retention=1.0``, where nothing is evicted.

One process a side, each with its engine loaded once; the sides then take turns, round
by round, so that a slower minute of the machine is every side's. Reported are ratios
to stock within a round: median, lowest and highest.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from sides import STOCK, make_engine, serve_rounds, take_turns

from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.provenance import provenance

BLOCK_SIZE = 32
NUM_SEQS = 8
PROMPT_TOKENS = 64
DECODE_STEPS = 12
SEED = 0


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


def serve_side(model: str, tiers: str) -> None:
    """Be a side of the comparison."""
    policy = None
    if tiers not in STOCK:
        config = {"retention": 1.0, "tiers": int(tiers)}
        policy = {"kv_policy": "pyramid", "kv_policy_config": config}
    engine = make_engine(
        model,
        policy,
        SEED,
        block_size=BLOCK_SIZE,
        max_model_len=1024,
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=2048,
    )
    serve_rounds(lambda: time_round(engine), lambda: time_round(engine))


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
        serve_side(folder, side)
        return
    arguments = {
        name: [__file__, "--side", name, "--model", folder]
        for name in [*STOCK, *tiers.split(",")]
    }
    results = take_turns(arguments, rounds)
    Console().print(table(results))
    if json_file is not None:
        kinds = {kind: ratios(results, kind) for kind in ("decode", "prefill")}
        figures = {"ratio_to_stock": kinds, "tokens_per_s": results}
        report = figures | provenance(SEED)
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
