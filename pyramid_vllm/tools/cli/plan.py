"""``pyramid-vllm plan``: memory by arithmetic, no engine."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import (
    KVPolicyError,
    LengthRule,
    MemoryModel,
    PolicyConfig,
    fitted,
    profile_weights,
    resolve_policy,
    tier_layout,
)
from pyramid_vllm.policy.tiers import runs
from pyramid_vllm.tools.figures import right_table
from pyramid_vllm.tools.model_config import read_config
from pyramid_vllm.tools.options import OVERRIDES, POLICY, argument, option
from pyramid_vllm.tools.sizes import format_bytes, parse_bytes


@dataclass(frozen=True)
class PlanRequest:
    """Show what a policy means for a model's memory, from its configuration alone."""

    model: str = argument(
        "A model's folder, a bundled shape's name such as Llama-3-8B, or a hub name."
    )
    kv_policy: str = option("pyramid", POLICY)
    kv_policy_config: str | None = option(None, OVERRIDES)
    kv_memory: str = option("4GiB", "KV cache memory: bytes, or with KiB, MiB, GiB.")
    max_model_len: int | None = option(None, "Longest request; default: the model's.")
    output_tokens: int = option(128, "Generated tokens of such a request.", min=1)
    block_size: int = option(32, "Tokens of a page.", min=1)
    dtype: str | None = option(None, "The cache's dtype; default: the model's.")


@dataclass(frozen=True)
class MemoryPlan:
    """One request of the longest length; pairs are stock vLLM's and the policy's."""

    policy: PolicyConfig
    shape: ModelShape
    memory: MemoryModel
    prompt_tokens: int
    output_tokens: int
    kv_memory: int
    kept: tuple[int, ...]
    """Prompt tokens that each tier keeps, a layer."""
    mean_kept: float
    """Mean over layers."""
    mean_rows: float
    """Rows of the prompt, in one chunk, that a layer computes, mean over layers."""
    request_bytes: tuple[int, int]
    """KV bytes of the request."""
    concurrency: tuple[float, float]
    """Such requests at once."""


def make_plan(request: PlanRequest) -> MemoryPlan:
    """Compute the plan.

    Raises:
        KVPolicyError: the policy does not fit the model.
        ValueError: another option is not valid.
        OSError: the model's configuration cannot be read.
    """
    policy = resolve_policy(request.kv_policy, request.kv_policy_config)
    if policy is None:
        raise KVPolicyError("kv_policy 'none' has nothing to plan")
    kv_memory, outputs = parse_bytes(request.kv_memory), request.output_tokens
    config = read_config(request.model)
    shape = ModelShape.of(config, request.dtype)
    policy = fitted(policy, profile_weights(config.get_text_config()))
    longest = request.max_model_len or shape.max_position
    if not outputs < longest:
        raise ValueError(
            f"output_tokens is {outputs}: valid is below the longest request, {longest}"
        )
    prompt, layout = longest - outputs, tier_layout(policy, shape.num_layers)
    rule = LengthRule(policy, layout)
    page_bytes = shape.token_bytes * request.block_size
    memory = MemoryModel(rule, request.block_size, page_bytes)
    kept = rule.cache_lengths(prompt)
    return MemoryPlan(
        policy=policy,
        shape=shape,
        memory=memory,
        prompt_tokens=prompt,
        output_tokens=outputs,
        kv_memory=kv_memory,
        kept=kept,
        mean_kept=layout.mean(kept),
        mean_rows=layout.mean(rule.num_rows(0, prompt)),
        request_bytes=(
            memory.stock_request_bytes(longest),
            memory.request_bytes(prompt, outputs),
        ),
        concurrency=(
            memory.stock_concurrency(kv_memory, longest),
            memory.concurrency(kv_memory, prompt, outputs),
        ),
    )


def print_plan(request: PlanRequest) -> None:
    """Print the plan as two tables."""
    plan = make_plan(request)
    console = Console()
    console.print(_layers(plan))
    console.print(_sides(plan))
    padding = plan.memory.rule.layout.num_padding_layers
    if padding:
        share = padding / plan.shape.num_layers
        console.print(
            f"The tiers do not divide {plan.shape.num_layers} layers evenly: "
            f"padding wastes {share:.1%} of the memory."
        )


def _layers(plan: MemoryPlan) -> Table:
    table = right_table(
        ("layers", "tokens kept a layer", "of the prompt", "KV bytes"),
        f"Policy {plan.policy.name}, prompt of {plan.prompt_tokens} tokens",
    )
    layout = plan.memory.rule.layout
    for kept, layers in zip(plan.kept, layout.layers, strict=True):
        pages = -(-(kept + plan.output_tokens) // plan.memory.block_size)
        table.add_row(
            runs(layers),
            f"{kept:,}",
            f"{kept / plan.prompt_tokens:.1%}",
            format_bytes(pages * plan.memory.layer_page_bytes * len(layers)),
        )
    return table


def _sides(plan: MemoryPlan) -> Table:
    title = f"One request, and {format_bytes(plan.kv_memory)} of KV memory"
    table = right_table(("", "stock vLLM", plan.policy.name), title)
    prompt = f"{plan.prompt_tokens:,}"
    table.add_row("prompt tokens kept a layer, mean", prompt, f"{plan.mean_kept:,.0f}")
    if plan.memory.rule.prunes:
        rows = f"{plan.mean_rows:,.0f}"
        table.add_row("prompt rows computed a layer, mean", prompt, rows)
    table.add_row("KV bytes a request", *map(format_bytes, plan.request_bytes))
    table.add_row("requests at once", *(f"{count:.1f}" for count in plan.concurrency))
    return table
