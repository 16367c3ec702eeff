"""The commands; what each does is imported when it runs."""

from dataclasses import replace
from typing import Annotated

import typer

from pyramid_vllm import __version__
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.cli.analyze import analyze
from pyramid_vllm.tools.cli.demo import DemoSettings, run_demo
from pyramid_vllm.tools.cli.eval import evaluate
from pyramid_vllm.tools.cli.failing import command, or_fail
from pyramid_vllm.tools.cli.inspect import inspect
from pyramid_vllm.tools.cli.name_vllm import name_vllm
from pyramid_vllm.tools.cli.plan import PlanRequest, print_plan
from pyramid_vllm.tools.cli.top import top
from pyramid_vllm.tools.simulate.settings import SimulateSettings


def _bench(settings: BenchSettings) -> None:
    from pyramid_vllm.tools.bench.run import run_bench
    from pyramid_vllm.tools.cli.model import make_model

    settings.check()
    # Made only once the options are in order.
    run_bench(replace(settings, model=settings.model or str(make_model())))


def _simulate(settings: SimulateSettings) -> None:
    from pyramid_vllm.tools.simulate.report import run_simulation

    run_simulation(settings)


def _demo(settings: DemoSettings) -> None:
    from pyramid_vllm.tools.cli.model import make_model

    run_demo(replace(settings, model=settings.model or str(make_model())))


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyramid-vllm {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="pyramid-vllm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("bench")(command(BenchSettings, _bench))
app.command("simulate")(command(SimulateSettings, _simulate))
app.command("eval")(evaluate)
app.command()(analyze)
app.command()(inspect)
app.command()(top)
app.command()(name_vllm)
app.command("plan")(command(PlanRequest, print_plan))
app.command("demo")(command(DemoSettings, _demo))


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
