"""``pyramid-vllm plan``: memory by arithmetic, no engine."""

from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Argument, Option

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
from pyramid_vllm.tools.model_config import read_config
from pyramid_vllm.tools.sizes import format_bytes, parse_bytes


@dataclass(frozen=True)
class PlanRequest:
    """Show what a policy means for a model's memory, from its configuration alone."""

    model: Annotated[
        str,
        Argument(
            help="A model's folder, a bundled shape's name such as Llama-3-8B, "
            "or a hub name."
        ),
    ]
    kv_policy: Annotated[str, Option(help="A preset, a YAML file or inline JSON.")] = (
        "pyramid"
    )
    kv_policy_config: Annotated[
        str | None, Option(help="Settings that replace it, as JSON.")
    ] = None
    kv_memory: Annotated[
        str, Option(help="KV cache memory: bytes, or with KiB, MiB, GiB.")
    ] = "4GiB"
    max_model_len: Annotated[
        int | None, Option(help="Longest request; default: the model's.")
    ] = None
    output_tokens: Annotated[
        int, Option(min=1, help="Generated tokens of such a request.")
    ] = 128
    block_size: Annotated[int, Option(min=1, help="Tokens of a page.")] = 32
    dtype: Annotated[
        str | None, Option(help="The cache's dtype; default: the model's.")
    ] = None


@dataclass(frozen=True)
class MemoryPlan:
    """One request of the longest length, under the policy and in stock vLLM."""

    policy: PolicyConfig
    shape: ModelShape
    memory: MemoryModel
    prompt_tokens: int
    output_tokens: int
    kv_memory: int

    @property
    def kept(self) -> tuple[int, ...]:
        """Prompt tokens that each tier keeps, a layer."""
        return self.memory.rule.cache_lengths(self.prompt_tokens)

    @property
    def mean_kept(self) -> float:
        """Mean over layers."""
        return self.memory.rule.layout.mean(self.kept)

    @property
    def mean_rows(self) -> float:
        """Rows of the prompt, in one chunk, that a layer computes, mean over layers."""
        rule = self.memory.rule
        return rule.layout.mean(rule.num_rows(0, self.prompt_tokens))

    @property
    def request_bytes(self) -> tuple[int, int]:
        """KV bytes of the request: stock, policy."""
        tokens = self.prompt_tokens + self.output_tokens
        policy = self.memory.request_bytes(self.prompt_tokens, self.output_tokens)
        return self.memory.stock_request_bytes(tokens), policy

    @property
    def concurrency(self) -> tuple[float, float]:
        """Such requests at once: stock, policy."""
        tokens = self.prompt_tokens + self.output_tokens
        return (
            self.memory.stock_concurrency(self.kv_memory, tokens),
            self.memory.concurrency(
                self.kv_memory, self.prompt_tokens, self.output_tokens
            ),
        )


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
    config = read_config(request.model)
    shape = ModelShape.of(config, request.dtype)
    policy = fitted(policy, profile_weights(config.get_text_config()))
    longest = request.max_model_len or shape.max_position
    if not request.output_tokens < longest:
        raise ValueError(
            f"output_tokens is {request.output_tokens}: valid is below the longest "
            f"request, {longest}"
        )
    rule = LengthRule(policy, tier_layout(policy, shape.num_layers))
    memory = MemoryModel(
        rule, request.block_size, shape.token_bytes * request.block_size
    )
    return MemoryPlan(
        policy=policy,
        shape=shape,
        memory=memory,
        prompt_tokens=longest - request.output_tokens,
        output_tokens=request.output_tokens,
        kv_memory=parse_bytes(request.kv_memory),
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
    table = Table(
        title=f"Policy {plan.policy.name}, prompt of {plan.prompt_tokens} tokens"
    )
    for column in ("layers", "tokens kept a layer", "of the prompt", "KV bytes"):
        table.add_column(column, justify="right")
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
    table = Table(title=f"One request, and {format_bytes(plan.kv_memory)} of KV memory")
    for column in ("", "stock vLLM", plan.policy.name):
        table.add_column(column, justify="right")
    stock_bytes, bytes_ = plan.request_bytes
    stock_count, count = plan.concurrency
    table.add_row(
        "prompt tokens kept a layer, mean",
        f"{plan.prompt_tokens:,}",
        f"{plan.mean_kept:,.0f}",
    )
    if plan.memory.rule.prunes:
        table.add_row(
            "prompt rows computed a layer, mean",
            f"{plan.prompt_tokens:,}",
            f"{plan.mean_rows:,.0f}",
        )
    table.add_row("KV bytes a request", format_bytes(stock_bytes), format_bytes(bytes_))
    table.add_row("requests at once", f"{stock_count:.1f}", f"{count:.1f}")
    return table
