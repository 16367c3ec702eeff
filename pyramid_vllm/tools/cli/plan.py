"""``pyramid-vllm plan``: memory by arithmetic, no engine."""

from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.table import Table

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import (
    KVPolicyError,
    LengthRule,
    MemoryModel,
    fitted,
    num_pages,
    profile_weights,
    resolve_policy,
    tier_layout,
)
from pyramid_vllm.policy.tiers import runs
from pyramid_vllm.tools.figures import right_table
from pyramid_vllm.tools.model_config import read_config
from pyramid_vllm.tools.options import (
    OVERRIDES,
    POLICY,
    SETTINGS_CONFIG,
    Bytes,
    argument,
    option,
)
from pyramid_vllm.tools.sizes import format_bytes


@dataclass(frozen=True, config=SETTINGS_CONFIG)
class PlanRequest:
    """Show what a policy means for a model's memory, from its configuration alone."""

    model: str = argument(
        "A model's folder, a bundled shape's name such as Llama-3-8B, or a hub name."
    )
    kv_policy: str = option("pyramid", POLICY)
    kv_policy_config: str | None = option(None, OVERRIDES)
    kv_memory: Bytes = option("4GiB", "KV cache memory: bytes, or with KiB, MiB, GiB.")
    max_model_len: int | None = option(None, "Longest request; default: the model's.")
    output_tokens: int = option(128, "Generated tokens of such a request.", min=1)
    block_size: int = option(32, "Tokens of a page.", min=1)
    dtype: str | None = option(None, "The cache's dtype; default: the model's.")


def make_plan(request: PlanRequest) -> tuple[MemoryModel, int]:
    """The memory of requests, and the longest prompt, in tokens.

    Raises:
        KVPolicyError: the policy does not fit the model.
        ValueError: another option is not valid.
        OSError: the model's configuration cannot be read.
    """
    policy = resolve_policy(request.kv_policy, request.kv_policy_config)
    if policy is None:
        raise KVPolicyError("kv_policy 'none' has nothing to plan")
    config = read_config(request.model)
    shape = ModelShape.of(config, request.dtype)
    policy = fitted(policy, profile_weights(config.get_text_config()))
    longest, outputs = (
        request.max_model_len or shape.max_position,
        request.output_tokens,
    )
    if not outputs < longest:
        raise ValueError(
            f"output_tokens is {outputs}: valid is below the longest request, {longest}"
        )
    rule = LengthRule(policy, tier_layout(policy, shape.num_layers))
    page_bytes = shape.token_bytes * request.block_size
    return MemoryModel(rule, request.block_size, page_bytes), longest - outputs


def print_plan(request: PlanRequest) -> None:
    """Print the plan as two tables."""
    memory, prompt = make_plan(request)
    console, layout = Console(), memory.rule.layout
    console.print(_layers(memory, prompt, request.output_tokens))
    console.print(_sides(memory, prompt, request.output_tokens, request.kv_memory))
    if layout.num_padding_layers:
        share = layout.num_padding_layers / layout.num_layers
        console.print(
            f"The tiers do not divide {layout.num_layers} layers evenly: "
            f"padding wastes {share:.1%} of the memory."
        )


def _layers(memory: MemoryModel, prompt: int, outputs: int) -> Table:
    """What each tier keeps of the prompt."""
    rule = memory.rule
    table = right_table(
        ("layers", "tokens kept a layer", "of the prompt", "KV bytes"),
        f"Policy {rule.config.name}, prompt of {prompt} tokens",
    )
    for kept, layers in zip(
        rule.cache_lengths(prompt), rule.layout.layers, strict=True
    ):
        (pages,) = num_pages((kept + outputs,), memory.block_size)
        table.add_row(
            runs(layers),
            f"{kept:,}",
            f"{kept / prompt:.1%}",
            format_bytes(pages * memory.layer_page_bytes * len(layers)),
        )
    return table


def _sides(memory: MemoryModel, prompt: int, outputs: int, kv_bytes: int) -> Table:
    """One request of the longest length, in stock vLLM and under the policy."""
    rule, longest = memory.rule, prompt + outputs
    title = f"One request, and {format_bytes(kv_bytes)} of KV memory"
    table = right_table(("", "stock vLLM", rule.config.name), title)
    kept = rule.layout.mean(rule.cache_lengths(prompt))
    table.add_row("prompt tokens kept a layer, mean", f"{prompt:,}", f"{kept:,.0f}")
    if rule.prunes:
        rows = rule.layout.mean(rule.num_rows(0, prompt))
        name = "prompt rows computed a layer, mean"
        table.add_row(name, f"{prompt:,}", f"{rows:,.0f}")
    stock, ours = (
        memory.stock_request_bytes(longest),
        memory.request_bytes(prompt, outputs),
    )
    table.add_row("KV bytes a request", format_bytes(stock), format_bytes(ours))
    fits = memory.stock_concurrency(kv_bytes, longest)
    more = memory.concurrency(kv_bytes, prompt, outputs)
    table.add_row("requests at once", f"{fits:.1f}", f"{more:.1f}")
    return table
