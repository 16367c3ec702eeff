"""What pruned prefill gains: time to first token and prefill tokens/s against stock.

One prompt at a time, in one chunk. One process a side; stock and a few settings at a
time take turns, as many as fit into memory, and ratios are to stock within a round.
Beside them stand the rows that layers computed, and the share of the gain that these
rows promise.
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

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.provenance import provenance

SEED = 0
PRESET = "pyramidinfer"
#: Beside stock; each holds the model's weights.
SIDES_AT_ONCE = 4
#: Less of the gain that the rows promise than this is worth a look.
WORTH = 0.85


def settings(num_layers: int, retentions: list[float]) -> dict[str, dict[str, Any]]:
    """Policies by name, but stock's."""
    policies: dict[str, dict[str, Any]] = {PRESET: {"kv_policy": PRESET}}
    for retention in retentions:
        for layer in (0, num_layers // 3, num_layers // 2):
            policies[f"retention {retention:g} from {layer}"] = {
                "kv_policy": "pyramid-by-depth",
                "kv_policy_config": {"retention": retention, "prune_from": layer},
            }
    return policies


def time_prompt(engine: Any, num_tokens: int) -> dict[str, float]:
    """One prompt from arrival to its first token."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False
    )
    prompt = [(31 * i * i + 7 * i) % 4000 + 5 for i in range(num_tokens)]
    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    counters = getattr(getattr(worker, "tier_state", None), "counters", None)
    before = counters.num_computed.sum() if counters else 0
    arrival, in_steps = time.perf_counter(), 0.0
    engine.add_request("0", {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        in_steps += time.perf_counter() - start
    rows = 1.0
    if counters:
        num_layers = len(counters.num_computed)
        rows = (counters.num_computed.sum() - before) / num_layers / num_tokens
    return {
        "ttft_s": time.perf_counter() - arrival,
        "prefill_tokens_per_s": num_tokens / in_steps,
        "row_retention": float(rows),
    }


def serve_side(model: str, lengths: list[int], policy: dict[str, Any] | None) -> None:
    """Be a side of the comparison."""
    longest = max(lengths)
    engine = make_engine(
        model,
        policy,
        SEED,
        block_size=32,
        max_model_len=longest + 1,
        max_num_seqs=1,
        max_num_batched_tokens=longest,
    )
    serve_rounds(
        lambda: {str(length): time_prompt(engine, length) for length in lengths},
        lambda: time_prompt(engine, min(lengths)),
    )


Report = dict[str, dict[str, float | list[float]]]


def figures(results: dict[str, list[Any]], length: int) -> Report:
    """Medians and ranges of sides that took turns, for one length of prompt."""
    sides = {
        name: [figure[str(length)] for figure in rounds]
        for name, rounds in results.items()
    }
    stock = sides["stock"]
    report: Report = {}
    for name, rounds in sides.items():
        faster = [
            a["prefill_tokens_per_s"] / b["prefill_tokens_per_s"]
            for a, b in zip(rounds, stock, strict=True)
        ]
        sooner = [a["ttft_s"] / b["ttft_s"] for a, b in zip(rounds, stock, strict=True)]
        rows = statistics.median(figure["row_retention"] for figure in rounds)
        report[name] = {
            "row_retention": rows,
            "prefill_ratio": statistics.median(faster),
            "prefill_ratio_range": [min(faster), max(faster)],
            "ttft_ratio": statistics.median(sooner),
            "ttft_ratio_range": [min(sooner), max(sooner)],
            "gain_of_promise": statistics.median(faster) * rows,
            "prefill_tokens_per_s": statistics.median(
                figure["prefill_tokens_per_s"] for figure in rounds
            ),
            "ttft_s": statistics.median(figure["ttft_s"] for figure in rounds),
        }
    return report


def table(report: dict[str, dict[str, Any]], length: int) -> Table:
    """Figures as people read them."""
    made = Table(
        title=f"Prompt of {length} tokens; ratios to stock: median (lowest-highest)",
        caption="'from' is prune_from",
    )
    for column in ("", "rows", "tokens/s", "ratio", "TTFT ratio", "of the promise"):
        made.add_column(column, justify="right")
    for name, side in report.items():
        low, high = side["prefill_ratio_range"]
        made.add_row(
            name,
            f"{side['row_retention']:.1%}",
            f"{side['prefill_tokens_per_s']:.0f}",
            f"{side['prefill_ratio']:.2f} ({low:.2f}-{high:.2f})",
            f"{side['ttft_ratio']:.2f}",
            f"{side['gain_of_promise']:.0%}"
            + (" !" if side["gain_of_promise"] < WORTH else ""),
        )
    return made


def main(
    model: Annotated[str | None, typer.Option()] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Lengths.")] = "1024,4096",
    retentions: Annotated[str, typer.Option()] = "0.7,0.5,0.3",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print time to first token and prefill tokens/s of pruned prefill, and rows."""
    from transformers import AutoConfig

    folder = model or str(make_model())
    lengths = [int(length) for length in prompt_tokens.split(",")]
    num_layers = ModelShape.of(AutoConfig.from_pretrained(folder)).num_layers
    policies = settings(num_layers, [float(r) for r in retentions.split(",") if r])
    if side is not None:
        serve_side(folder, lengths, None if side in STOCK else policies[side])
        return
    common = [
        __file__,
        *("--model", folder, "--prompt-tokens", prompt_tokens),
        *("--retentions", retentions, "--side"),
    ]
    names = [*STOCK[1:], *policies]
    results = [
        take_turns(
            {
                name: [*common, name]
                for name in ("stock", *names[i : i + SIDES_AT_ONCE])
            },
            rounds,
        )
        for i in range(0, len(names), SIDES_AT_ONCE)
    ]
    reports: dict[int, Report] = {length: {} for length in lengths}
    for length, report in reports.items():
        for group in results:
            found = figures(group, length)
            report.update({k: v for k, v in found.items() if k not in report})
    for length, report in reports.items():
        Console().print(table(report, length))
    if json_file is not None:
        content = {"prompt_tokens": reports, "rounds": results} | provenance(SEED)
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
