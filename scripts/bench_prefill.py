"""What pruned prefill gains: time to first token and prefill tokens/s against stock.

One prompt at a time, in one chunk. Stock and a few settings at a time take turns, as
many as fit into memory, and ratios are to stock within a round. Beside them stand the
rows that layers computed, and the share of the gain that these rows promise.
"""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from turns import SEED, STOCK, Side, ratios, spread, step_seconds, take_turns

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.provenance import write_report

PRESET = "pyramidinfer"
#: Beside stock; each holds the model's weights.
SIDES_AT_ONCE = 4
#: Less of the gain that the rows promise than this is worth a look.
WORTH = 0.85


def policies_of(num_layers: int, retentions: list[float]) -> dict[str, dict[str, Any]]:
    """Settings of policies by name; none are stock's."""
    policies: dict[str, dict[str, Any]] = {STOCK[1]: {}, PRESET: {"kv_policy": PRESET}}
    for retention in retentions:
        for layer in (0, num_layers // 3, num_layers // 2):
            policies[f"retention {retention:g} from {layer}"] = {
                "kv_policy": "pyramid-by-depth",
                "kv_policy_config": {"retention": retention, "prune_from": layer},
            }
    return policies


def time_prompt(engine: Any, num_tokens: int) -> dict[str, float]:
    """One prompt from arrival to its first token."""
    prompt = [(31 * i * i + 7 * i) % 4000 + 5 for i in range(num_tokens)]
    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    counters = getattr(getattr(worker, "tier_state", None), "counters", None)
    before = counters.num_computed.sum() if counters else 0
    arrival = time.perf_counter()
    in_steps = sum(step_seconds(engine, [prompt], 1))
    ttft_s, rows = time.perf_counter() - arrival, 1.0
    if counters:
        num_layers = len(counters.num_computed)
        rows = float(counters.num_computed.sum() - before) / num_layers / num_tokens
    return {
        "ttft_s": ttft_s,
        "prefill_tokens_per_s": num_tokens / in_steps,
        "row_retention": rows,
    }


def time_round(lengths: list[int], engine: Any) -> dict[int, dict[str, float]]:
    """A prompt of each length."""
    return {length: time_prompt(engine, length) for length in lengths}


def make_side(model: str, lengths: list[int], policy: dict[str, Any]) -> Side:
    """An engine that takes any of the prompts in one chunk."""
    longest = max(lengths)
    settings = {
        "model": model,
        "max_model_len": longest + 1,
        "max_num_seqs": 1,
        "max_num_batched_tokens": longest,
    }
    warm_up = partial(time_prompt, num_tokens=min(lengths))
    return Side(settings | policy, partial(time_round, lengths), warm_up)


Report = dict[str, dict[str, Any]]


def figures(results: dict[str, list[Any]], length: int) -> Report:
    """Medians and ranges of sides that took turns, for one length of prompt."""
    sides = {
        name: [figure[length] for figure in rounds] for name, rounds in results.items()
    }
    report: Report = {}
    for name, rounds in sides.items():
        medians = {
            key: statistics.median(figure[key] for figure in rounds)
            for key in ("row_retention", "prefill_tokens_per_s", "ttft_s")
        }
        faster = ratios(rounds, sides["stock"], "prefill_tokens_per_s")
        sooner = ratios(rounds, sides["stock"], "ttft_s")
        report[name] = medians | {
            "prefill_ratio": statistics.median(faster),
            "prefill_ratio_range": [min(faster), max(faster)],
            "ttft_ratio": statistics.median(sooner),
            "ttft_ratio_range": [min(sooner), max(sooner)],
            "gain_of_promise": statistics.median(faster) * medians["row_retention"],
        }
    return report


def table(report: Report, length: int) -> Table:
    """Figures as people read them."""
    made = Table(
        title=f"Prompt of {length} tokens; ratios to stock: median (lowest-highest)",
        caption="'from' is prune_from",
    )
    for column in ("", "rows", "tokens/s", "ratio", "TTFT ratio", "of the promise"):
        made.add_column(column, justify="right")
    for name, side in report.items():
        made.add_row(
            name,
            f"{side['row_retention']:.1%}",
            f"{side['prefill_tokens_per_s']:.0f}",
            spread([side["prefill_ratio"], *side["prefill_ratio_range"]], 2),
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
) -> None:
    """Print time to first token and prefill tokens/s of pruned prefill, and rows."""
    from transformers import AutoConfig

    folder = model or str(make_model())
    lengths = [int(length) for length in prompt_tokens.split(",")]
    num_layers = ModelShape.of(AutoConfig.from_pretrained(folder)).num_layers
    policies = policies_of(num_layers, [float(r) for r in retentions.split(",") if r])
    sides = {name: make_side(folder, lengths, args) for name, args in policies.items()}
    stock, names, results = make_side(folder, lengths, {}), list(sides), []
    for i in range(0, len(names), SIDES_AT_ONCE):
        others = {name: sides[name] for name in names[i : i + SIDES_AT_ONCE]}
        results.append(take_turns({"stock": stock} | others, rounds))
    reports: dict[int, Report] = {length: {} for length in lengths}
    for length, report in reports.items():
        for group in results:
            for name, side in figures(group, length).items():
                report.setdefault(name, side)
        Console().print(table(report, length))
    if json_file is not None:
        content = {"prompt_tokens": reports, "rounds": results}
        write_report(json_file, content, SEED)


if __name__ == "__main__":
    typer.run(main)
