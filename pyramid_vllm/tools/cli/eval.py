"""``pyramid-vllm eval``: what policies keep of a model's quality."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyramid_vllm.tools.cli.from_settings import from_settings
from pyramid_vllm.tools.quality.settings import EvalSettings


@from_settings(EvalSettings)
def evaluate(
    settings: EvalSettings,
    out: Annotated[
        Path, typer.Option(help="Results; runs that are there are kept.")
    ] = Path("eval-results"),
) -> None:
    """Compare policies with the full cache: losses, retrieval, GSM8K, memory."""
    from pyramid_vllm.tools.quality.run import run_eval

    run_eval(settings, out, Console())
