"""Overhead of the policy at ``retention=1.0``, where nothing is evicted.

Stock vLLM and numbers of tiers take turns, round by round. Reported are ratios to stock
within a round: median, lowest and highest.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from turns import SEED, STOCK, Side, ratios, spread, step_seconds, take_turns

from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.provenance import write_report

NUM_SEQS = 8
PROMPT_TOKENS = 64
DECODE_STEPS = 12
KINDS = ("decode", "prefill")


def time_round(engine: Any) -> dict[str, float]:
    """Tokens/s of one prefill step and of the median decode step after it."""
    prompts = [
        [(7 * i + j) % 4000 + 5 for j in range(PROMPT_TOKENS)] for i in range(NUM_SEQS)
    ]
    prefill, *decode = step_seconds(engine, prompts, DECODE_STEPS + 1)
    assert len(decode) == DECODE_STEPS, "the prompts did not fit into one step"
    return {
        "prefill": NUM_SEQS * PROMPT_TOKENS / prefill,
        "decode": NUM_SEQS / statistics.median(decode),
    }


def make_side(model: str, tiers: str) -> Side:
    """An engine with so many tiers, or a stock one."""
    settings: dict[str, Any] = {
        "model": model,
        "max_model_len": 1024,
        "max_num_seqs": NUM_SEQS,
        "max_num_batched_tokens": 2048,
    }
    if tiers not in STOCK:
        config = {"retention": 1.0, "tiers": int(tiers)}
        settings |= {"kv_policy": "pyramid", "kv_policy_config": config}
    return Side(settings, time_round, time_round)


def table(found: dict[str, dict[str, list[float]]]) -> Table:
    """Ratios as people read them."""
    made = Table(
        title="tokens/s at retention=1.0, ratio to stock: median (lowest-highest)"
    )
    for column in ("tiers", *KINDS):
        made.add_column(column, justify="right")
    for name in found[KINDS[0]]:
        made.add_row(name, *(spread(found[kind][name], 3) for kind in KINDS))
    return made


def main(
    model: Annotated[str | None, typer.Option()] = None,
    tiers: Annotated[str, typer.Option(help="Numbers of tiers.")] = "1,5,10,30",
    rounds: Annotated[int, typer.Option(min=1)] = 40,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the ratios of `retention=1.0` to stock vLLM, by number of tiers."""
    folder = model or str(make_model())
    names = [*STOCK, *tiers.split(",")]
    results = take_turns({name: make_side(folder, name) for name in names}, rounds)
    stock = results["stock"]
    found = {
        kind: {name: ratios(side, stock, kind) for name, side in results.items()}
        for kind in KINDS
    }
    Console().print(table(found))
    if json_file is not None:
        report = {"ratio_to_stock": found, "tokens_per_s": results}
        write_report(json_file, report, SEED)


if __name__ == "__main__":
    typer.run(main)
