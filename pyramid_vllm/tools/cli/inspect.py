"""``pyramid-vllm inspect``: which tokens of a prompt each tier keeps."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyramid_vllm.tools.cli.from_settings import from_settings
from pyramid_vllm.tools.inspection.settings import InspectSettings


@from_settings(InspectSettings)
def inspect(
    settings: InspectSettings,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: inspect-results.")
    ] = None,
    json_only: Annotated[
        bool,
        typer.Option("--json", help="Print the JSON; write files only with --out."),
    ] = False,
) -> None:
    """Run one prompt and show which of its tokens each tier kept."""
    from pyramid_vllm.tools.inspection.run import (
        inspect_prompt,
        print_table,
        report,
        write_report,
    )
    from pyramid_vllm.tools.plotting import check_matplotlib

    folder = out if json_only else out or Path("inspect-results")
    if folder is not None:
        check_matplotlib()  # before the model runs, not after it
    found = inspect_prompt(settings)
    if folder is not None:
        write_report(found, folder)
    if json_only:
        typer.echo(json.dumps(report(found), ensure_ascii=False))
        return
    console = Console()
    print_table(found, console)
    console.print(f"results are in {folder}")
