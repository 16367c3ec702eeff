"""Options of ``pyramid-vllm bench``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pyramid_vllm.tools.cli.failing import or_fail

ModelOption = Annotated[
    str | None, typer.Option(help="A model's folder; default: the bundled one.")
]
PoliciesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A preset, a YAML file or inline JSON; repeat it to compare more. Stock "
        "vLLM is always there. Default: pyramid."
    ),
]
WorkloadOption = Annotated[
    str, typer.Option(help="offline: one batch; online: a server under load.")
]
PromptOption = Annotated[
    str,
    typer.Option(
        help="Length of prompts, or of each turn's own part of them: 512, or a range "
        "like 512-2048. A shared prefix comes on top."
    ),
]
OutputOption = Annotated[
    str, typer.Option(help="Length of outputs, likewise; at least 2.")
]
TextOption = Annotated[
    Path | None,
    typer.Option(help="Prompts are consecutive windows of this file's tokens."),
]
MemoryOption = Annotated[
    list[str] | None,
    typer.Option(
        help="KV memory: bytes like 80MiB, or stock sequences of the longest request "
        "like 4x; repeat it for a sweep. Default: 4x."
    ),
]
RateOption = Annotated[
    list[float] | None,
    typer.Option(
        help="Requests a second of the online workload, as a Poisson process; repeat "
        "it for more points. Default: all at once."
    ),
]
DtypeOption = Annotated[
    str | None, typer.Option(help="Default: float32 on CPU, else auto.")
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help="Further settings of vLLM's engine, as JSON. Prefix caching is on, as it "
        "is in vLLM; '{\"enable_prefix_caching\": false}' switches it off. Unless it "
        "says so, CPU engines run eagerly."
    ),
]
SharedOption = Annotated[
    int,
    typer.Option(help="Tokens of a prefix that prompts share, before their own ones."),
]
PrefixesOption = Annotated[
    int, typer.Option(help="How many shared prefixes there are; prompts take turns.")
]
TurnsOption = Annotated[
    int,
    typer.Option(
        help="Turns of each conversation: a prompt is the one before it, the answer to "
        "that, and an own part. Above 1, --workload is offline."
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Write the medians of every point to this file."),
]
OutOption = Annotated[
    Path, typer.Option(help="Folder of results; runs finished in it are not repeated.")
]


def bench(
    model: ModelOption = None,
    kv_policy: PoliciesOption = None,
    workload: WorkloadOption = "offline",
    num_prompts: Annotated[int, typer.Option(min=1)] = 24,
    prompt_tokens: PromptOption = "768",
    output_tokens: OutputOption = "128",
    text: TextOption = None,
    kv_memory: MemoryOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_num_seqs: Annotated[int, typer.Option(min=1)] = 128,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1)] = 2048,
    dtype: DtypeOption = None,
    engine_args: EngineOption = None,
    request_rate: RateOption = None,
    shared_prefix: SharedOption = 0,
    num_prefixes: PrefixesOption = 1,
    turns: TurnsOption = 1,
    json_file: JsonOption = None,
    out: OutOption = Path("bench-results"),
) -> None:
    """Compare stock vLLM with KV policies: same requests, same KV bytes."""
    options: dict[str, Any] = {
        "workload": workload,
        "num_prompts": num_prompts,
        "text": text,
        "repeats": repeats,
        "seed": seed,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "dtype": dtype,
        "request_rates": tuple(request_rate or ()),
        "out": out,
        "shared_prefix": shared_prefix,
        "num_prefixes": num_prefixes,
        "turns": turns,
        "json_file": json_file,
    }
    texts = (kv_policy, prompt_tokens, output_tokens, kv_memory, engine_args)
    or_fail(lambda: _run(model, options, *texts))


def _run(
    model: str | None,
    options: dict[str, Any],
    kv_policy: list[str] | None,
    prompt_tokens: str,
    output_tokens: str,
    kv_memory: list[str] | None,
    engine_args: str | None,
) -> None:
    from dataclasses import replace

    from pyramid_vllm.tools.bench import settings as parts
    from pyramid_vllm.tools.bench.run import run_bench
    from pyramid_vllm.tools.cli.model import make_model

    settings = parts.BenchSettings(
        model=model or "",
        sides=parts.parse_sides(kv_policy or ["pyramid"]),
        prompt_tokens=parts.TokenRange.parse("--prompt-tokens", prompt_tokens, 1),
        output_tokens=parts.TokenRange.parse("--output-tokens", output_tokens, 2),
        kv_memory=tuple(map(parts.KVMemory.parse, kv_memory or ["4x"])),
        engine_args=parts.parse_engine_args(engine_args),
        **options,
    )
    settings.check()
    # Made only once the options are in order.
    run_bench(settings if model else replace(settings, model=str(make_model())))
