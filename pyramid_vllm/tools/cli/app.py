"""Commands and their options."""

from pathlib import Path
from typing import Annotated

import typer

from pyramid_vllm import __version__
from pyramid_vllm.tools.cli.analyze import analyze
from pyramid_vllm.tools.cli.bench import bench
from pyramid_vllm.tools.cli.eval import evaluate
from pyramid_vllm.tools.cli.failing import or_fail
from pyramid_vllm.tools.cli.inspect import inspect
from pyramid_vllm.tools.cli.name_vllm import name_vllm
from pyramid_vllm.tools.cli.simulate import simulate
from pyramid_vllm.tools.cli.top import top
from pyramid_vllm.tools.sizes import parse_bytes

app = typer.Typer(
    name="pyramid-vllm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.command()(simulate)
app.command("eval")(evaluate)
app.command()(analyze)
app.command()(inspect)
app.command()(top)
app.command()(name_vllm)

PolicyOption = Annotated[
    str, typer.Option("--kv-policy", help="A preset, a YAML file or inline JSON.")
]
OverridesOption = Annotated[
    str | None,
    typer.Option("--kv-policy-config", help="Settings that replace it, as JSON."),
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyramid-vllm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """A pyramid KV cache for stock vLLM."""


@app.command()
def model(
    force: Annotated[
        bool, typer.Option(help="Make it again, even if it is there.")
    ] = False,
) -> None:
    """Make the SmolLM2-135M-Instruct folder, once, and print its path."""
    from pyramid_vllm.tools.cli.model import make_model

    typer.echo(or_fail(lambda: make_model(force=force)))


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A model's folder, a bundled shape's name such as Llama-3-8B, "
            "or a hub name."
        ),
    ],
    kv_policy: PolicyOption = "pyramid",
    kv_policy_config: OverridesOption = None,
    kv_memory: Annotated[
        str, typer.Option(help="KV cache memory: bytes, or with KiB, MiB, GiB.")
    ] = "4GiB",
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest request; default: the model's.")
    ] = None,
    output_tokens: Annotated[
        int, typer.Option(min=1, help="Generated tokens of such a request.")
    ] = 128,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 32,
    dtype: Annotated[
        str | None, typer.Option(help="The cache's dtype; default: the model's.")
    ] = None,
) -> None:
    """Show what a policy means for a model's memory, from its configuration alone."""
    from pyramid_vllm.tools.cli.plan import PlanRequest, print_plan

    request = PlanRequest(
        model=model,
        kv_policy=kv_policy,
        kv_policy_config=kv_policy_config,
        kv_memory=or_fail(lambda: parse_bytes(kv_memory)),
        max_model_len=max_model_len,
        output_tokens=output_tokens,
        block_size=block_size,
        dtype=dtype,
    )
    or_fail(lambda: print_plan(request))


@app.command()
def demo(
    kv_policy: PolicyOption = "pyramid",
    kv_policy_config: OverridesOption = None,
    model: Annotated[
        str | None, typer.Option(help="A model's folder; default: the bundled one.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1)] = 24,
    prompt_tokens: Annotated[int, typer.Option(min=64)] = 768,
    output_tokens: Annotated[int, typer.Option(min=1)] = 128,
    stock_sequences: Annotated[
        int, typer.Option(min=1, help="KV memory, in sequences of stock vLLM.")
    ] = 4,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Run one batch of long prompts through stock vLLM and through a policy."""
    from pyramid_vllm.tools.cli.demo import DemoSettings, run_demo
    from pyramid_vllm.tools.cli.model import make_model

    settings = DemoSettings(
        model=model or str(or_fail(make_model)),
        kv_policy=kv_policy,
        kv_policy_config=kv_policy_config,
        num_prompts=num_prompts,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        stock_sequences=stock_sequences,
    )
    or_fail(lambda: run_demo(settings, json_file))
