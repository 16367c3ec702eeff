"""The commands; what each does is imported when it runs."""

from dataclasses import replace
from importlib import import_module
from typing import Annotated, Any

import typer

from pyramid_vllm import __version__
from pyramid_vllm.tools.analysis.settings import AnalyzeSettings
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.cli.demo import DemoSettings
from pyramid_vllm.tools.cli.name_vllm import name_vllm
from pyramid_vllm.tools.cli.plan import PlanRequest
from pyramid_vllm.tools.inspection.settings import InspectSettings
from pyramid_vllm.tools.monitor.settings import TopSettings
from pyramid_vllm.tools.options import command, or_fail
from pyramid_vllm.tools.quality.settings import EvalSettings
from pyramid_vllm.tools.simulate.settings import SimulateSettings

app = typer.Typer(
    name="pyramid-vllm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _add(name: str, settings: type[Any], function: str, has_model: bool = True) -> None:
    """Add a command that calls a function with its settings.

    Args:
        name: of the command.
        settings: see ``command``.
        function: ``module:function`` below ``pyramid_vllm.tools``.
        has_model: whether the default of ``settings.model`` is the bundled model.
    """

    def run(given: Any) -> None:
        if has_model and given.model is None:
            from pyramid_vllm.tools.cli.model import make_model

            given = replace(given, model=str(make_model()))
        module, _, called = function.partition(":")
        getattr(import_module(f"pyramid_vllm.tools.{module}"), called)(given)

    app.command(name)(command(settings, run))


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyramid-vllm {__version__}")
        raise typer.Exit


_add("bench", BenchSettings, "bench.run:run_bench")
_add("simulate", SimulateSettings, "simulate.report:run_simulation", False)
_add("eval", EvalSettings, "quality.run:run_eval")
_add("analyze", AnalyzeSettings, "analysis.run:run_analysis")
_add("inspect", InspectSettings, "inspection.run:run_inspect")
_add("top", TopSettings, "monitor.top:run_top", False)
app.command()(name_vllm)
_add("plan", PlanRequest, "cli.plan:print_plan", False)
_add("demo", DemoSettings, "cli.demo:run_demo")


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
