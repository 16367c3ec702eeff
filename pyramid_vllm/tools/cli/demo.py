"""``pyramid-vllm demo``: one batch, stock vLLM and a policy, the same KV bytes."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

from rich.console import Console

from pyramid_vllm.compat import check_vllm_version
from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import NONE, num_pages, resolve_policy
from pyramid_vllm.tools.bench.measure import MeasureTask, measure
from pyramid_vllm.tools.bench.watch import Measured
from pyramid_vllm.tools.chat import chat_ids
from pyramid_vllm.tools.figures import Metric, bars, side_label, side_table
from pyramid_vllm.tools.options import JSON_FILE, MODEL, OVERRIDES, POLICY, option
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.quality.tasks import match_length
from pyramid_vllm.tools.sizes import format_bytes

_BLOCK_SIZE = 32
_SEED = 0
_QUESTION = "Explain the page below to a colleague, in a few short paragraphs.\n\n"
_SHOWN = (
    Metric("kv_bytes_per_request", "KV bytes a request"),
    Metric("max_num_running", "most sequences at once"),
    Metric("mean_num_running", "mean sequences at once", ".1f"),
    Metric("num_preemptions", "preemptions"),
    Metric("num_pages_freed", "pages freed by eviction"),
    Metric("prefix_hit_rate", "prompt tokens from the prefix cache", ".1%"),
    Metric("total_tokens_per_s", "tokens/s, prompt and output", ",.1f"),
    Metric("ratio_to_stock", "ratio to stock", ".2f"),
    Metric("greedy_agreement", "output equal to stock's up to", ".0%"),
)


@dataclass(frozen=True)
class DemoSettings:
    """Run one batch of long prompts through stock vLLM and through a policy."""

    kv_policy: str = option("pyramid", POLICY)
    kv_policy_config: str | None = option(None, OVERRIDES)
    model: str | None = option(None, MODEL)
    num_prompts: int = option(24, min=1)
    prompt_tokens: int = option(768, min=64)
    output_tokens: int = option(128, min=1)
    stock_sequences: int = option(4, "KV memory, in sequences of stock vLLM.", min=1)
    json_file: Path | None = option(None, JSON_FILE, "--json")


def run_demo(settings: DemoSettings) -> None:
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
        kv_policy = {"kv_policy": json.dumps(policy.model_dump())}
        sides[policy.name] = replace(task, engine_args=task.engine_args | kv_policy)
    shared = match_length(min(prompts), max(prompts))
    sharing = f"prompts share their first {shared} tokens"
    kv_bytes = task.engine_args["kv_cache_memory_bytes"]
    console = Console()
    console.print(
        f"{len(prompts)} prompts of about {settings.prompt_tokens} tokens, "
        f"{settings.output_tokens} output tokens each, "
        f"{format_bytes(kv_bytes)} of KV memory, prefix caching on ({sharing})"
    )
    measured = {}
    with bars(console, 28) as progress:
        for name, side in sides.items():
            label = side_label(name)
            bar = progress.add_task(f"{label}: loading", total=len(prompts))

            def advance(done: int, bar: Any = bar, label: str = label) -> None:
                progress.update(bar, completed=done, description=label)

            measured[name] = measure(side, advance)
    figures = {name: _figures(side, measured[NONE]) for name, side in measured.items()}
    console.print(side_table(_SHOWN, figures))
    if settings.json_file is not None:
        content = {
            "policies": figures,
            "settings": asdict(settings),
            "kv_bytes": kv_bytes,
            "sharing": sharing,
        }
        write_report(settings.json_file, content, _SEED)


def long_prompts(tokenizer: Any, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Chat prompts over pages of Python's manual, of about ``num_tokens`` tokens.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        num_prompts: how many.
        num_tokens: length of each, in tokens.

    Raises:
        ValueError: there is not that much text.
    """
    tokens: list[int] = []
    for name in sorted(topics):
        tokens += tokenizer.encode(topics[name], add_special_tokens=False)
        if len(tokens) >= num_prompts * num_tokens:
            break
    else:
        raise ValueError(
            f"num_prompts is {num_prompts}: valid is up to {len(tokens) // num_tokens} "
            f"prompts of {num_tokens} tokens"
        )
    length = num_tokens - len(chat_ids(tokenizer, _QUESTION))
    starts = range(0, num_prompts * num_tokens, num_tokens)
    pages = [tokens[start : start + length] for start in starts]
    return [chat_ids(tokenizer, _QUESTION + tokenizer.decode(page)) for page in pages]


def _stock_task(
    settings: DemoSettings, prompts: list[list[int]], shape: ModelShape
) -> MeasureTask:
    longest = max(map(len, prompts)) + settings.output_tokens
    (sequence,) = num_pages((longest,), _BLOCK_SIZE)
    pages = sequence * settings.stock_sequences + 1  # the null page
    page_bytes = _BLOCK_SIZE * shape.token_bytes * shape.num_layers
    engine_args = {
        "dtype": shape.dtype,
        "seed": _SEED,
        "kv_cache_memory_bytes": pages * page_bytes,
        "max_num_seqs": max(16, settings.num_prompts),
        "max_num_batched_tokens": max(1024, longest),
        "block_size": _BLOCK_SIZE,
        "max_model_len": longest,
        "enforce_eager": True,
    }
    outputs = [settings.output_tokens] * len(prompts)
    return MeasureTask(str(settings.model), [prompts], outputs, engine_args)


def greedy_agreement(outputs: list[list[int]], reference: list[list[int]]) -> float:
    """Mean share of an output that equals the reference, up to the first difference."""
    pairs = zip(outputs, reference, strict=True)
    return fmean(match_length(ours, theirs) / len(ours) for ours, theirs in pairs)


def _figures(side: Measured, stock: Measured) -> dict[str, Any]:
    figures = asdict(side)
    del figures["outputs"]
    return figures | {
        "greedy_agreement": greedy_agreement(side.outputs, stock.outputs),
        "ratio_to_stock": side.total_tokens_per_s / stock.total_tokens_per_s,
    }
