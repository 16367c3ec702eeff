"""``pyramid-vllm demo``: one batch, stock vLLM and a policy, the same KV bytes."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from pyramid_vllm.compat import check_vllm_version
from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import NONE, num_pages, resolve_policy
from pyramid_vllm.tools.bench.measure import MeasureTask
from pyramid_vllm.tools.bench.offline import measure
from pyramid_vllm.tools.bench.watch import Measured
from pyramid_vllm.tools.cli.prompts import long_prompts
from pyramid_vllm.tools.provenance import provenance
from pyramid_vllm.tools.quality.tasks import match_length
from pyramid_vllm.tools.sizes import format_bytes

_BLOCK_SIZE = 32
_SEED = 0


@dataclass(frozen=True)
class DemoSettings:
    """The options of the command."""

    model: str
    kv_policy: str
    kv_policy_config: str | None
    num_prompts: int
    prompt_tokens: int
    output_tokens: int
    stock_sequences: int


def run_demo(settings: DemoSettings, json_file: Path | None) -> None:
    """Measure both sides, print the table, write the figures.

    Raises:
        KVPolicyError: the policy is not valid, or vLLM not supported.
        RuntimeError: one side failed.
    """
    from transformers import AutoConfig, AutoTokenizer

    check_vllm_version()
    policy = resolve_policy(settings.kv_policy, settings.kv_policy_config)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    prompts = long_prompts(tokenizer, settings.num_prompts, settings.prompt_tokens)
    shape = ModelShape.of(AutoConfig.from_pretrained(settings.model), "float32")
    task = _stock_task(settings, prompts, shape)
    sides = {NONE: task}
    if policy is not None:
        sides[policy.name] = MeasureTask(
            **{**asdict(task), "kv_policy": json.dumps(policy.model_dump())}
        )
    console = Console()
    console.print(
        f"{len(prompts)} prompts of about {settings.prompt_tokens} tokens, "
        f"{settings.output_tokens} output tokens each, "
        f"{format_bytes(task.kv_bytes)} of KV memory, prefix caching on "
        f"({_sharing(prompts)})"
    )
    measured = _measure_all(console, sides)
    console.print(_table(measured))
    if json_file is not None:
        report = _report(settings, task, measured)
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _stock_task(
    settings: DemoSettings, prompts: list[list[int]], shape: ModelShape
) -> MeasureTask:
    longest = max(map(len, prompts)) + settings.output_tokens
    (sequence,) = num_pages((longest,), _BLOCK_SIZE)
    pages = sequence * settings.stock_sequences + 1  # the null page
    return MeasureTask(
        model=settings.model,
        prompts=prompts,
        output_tokens=settings.output_tokens,
        kv_bytes=pages * _BLOCK_SIZE * shape.token_bytes * shape.num_layers,
        block_size=_BLOCK_SIZE,
        max_num_seqs=max(16, settings.num_prompts),
        max_num_batched_tokens=max(1024, longest),
        kv_policy=None,
        seed=_SEED,
    )


def _sharing(prompts: list[list[int]]) -> str:
    """What prompts share, in words."""
    columns = zip(*prompts, strict=False)
    shared = takewhile(lambda column: len(set(column)) == 1, columns)
    return f"prompts share their first {len(list(shared))} tokens"


def _measure_all(
    console: Console, sides: dict[str, MeasureTask]
) -> dict[str, Measured]:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn())
    measured = {}
    with Progress(*columns, console=console) as progress:
        for name, task in sides.items():
            label = "stock vLLM" if name == NONE else f"policy {name}"
            bar = progress.add_task(f"{label}: loading", total=len(task.prompts))

            def advance(done: int, bar: Any = bar, label: str = label) -> None:
                progress.update(bar, completed=done, description=label)

            measured[name] = measure(task, advance)
    return measured


def greedy_agreement(outputs: list[list[int]], reference: list[list[int]]) -> float:
    """Mean share of an output that equals the reference, up to the first difference."""
    shares = [
        match_length(ours, theirs) / len(theirs)
        for ours, theirs in zip(outputs, reference, strict=True)
    ]
    return sum(shares) / len(shares)


def _table(measured: dict[str, Measured]) -> Table:
    table = Table()
    table.add_column("")
    stock = measured[NONE]
    for name in measured:
        table.add_column("stock vLLM" if name == NONE else name, justify="right")
    rows: list[tuple[str, Callable[[Measured], str]]] = [
        ("KV bytes a request", lambda m: f"{m.kv_bytes_per_request:,.0f}"),
        ("most sequences at once", lambda m: f"{m.max_num_running}"),
        ("mean sequences at once", lambda m: f"{m.mean_num_running:.1f}"),
        ("preemptions", lambda m: f"{m.num_preemptions}"),
        ("pages freed by eviction", lambda m: f"{m.num_pages_freed:,}"),
        ("prefix caching", lambda m: "on" if m.prefix_caching else "off"),
        ("prompt tokens from the prefix cache", lambda m: f"{m.prefix_hit_rate:.1%}"),
        ("tokens/s, prompt and output", lambda m: f"{m.total_tokens_per_s:.1f}"),
        (
            "ratio to stock",
            lambda m: f"{m.total_tokens_per_s / stock.total_tokens_per_s:.2f}",
        ),
        (
            "output equal to stock's up to",
            lambda m: f"{greedy_agreement(m.outputs, stock.outputs):.0%}",
        ),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(side) for side in measured.values()))
    return table


def _report(
    settings: DemoSettings, task: MeasureTask, measured: dict[str, Measured]
) -> dict[str, Any]:
    stock = measured[NONE]
    policies = {}
    for name, side in measured.items():
        figures = asdict(side)
        del figures["outputs"]
        figures["greedy_agreement"] = greedy_agreement(side.outputs, stock.outputs)
        ratio = side.total_tokens_per_s / stock.total_tokens_per_s
        policies[name] = figures | {"ratio_to_stock": ratio}
    return {
        "policies": policies,
        "settings": asdict(settings),
        "kv_bytes": task.kv_bytes,
        "sharing": _sharing(task.prompts),
    } | provenance(task.seed)
