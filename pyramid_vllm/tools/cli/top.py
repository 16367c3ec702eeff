"""``pyramid-vllm top``: what a server's policy does, live."""

from typing import Annotated

import typer

from pyramid_vllm.tools.cli.failing import fail


def top(
    url: Annotated[
        str, typer.Argument(help="A vLLM server, with or without /metrics.")
    ] = "http://127.0.0.1:8000",
    interval: Annotated[
        float, typer.Option(help="Seconds between two readings.")
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one picture, of one interval.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --once: the figures as JSON.")
    ] = False,
) -> None:
    """Show what the KV policy of a running server does, until Ctrl-C."""
    from rich.console import Console

    from pyramid_vllm.tools.monitor.scrape import ScrapeError
    from pyramid_vllm.tools.monitor.watch import show_live, show_once

    console = Console(highlight=False)
    try:
        if not 0.1 <= interval <= 3600:
            raise ValueError(
                f"'--interval' is {interval}: valid are 0.1 to 3600 seconds"
            )
        if as_json and not once:
            raise ValueError("'--json' is given: valid only with --once")
        if once:
            show_once(url, interval, as_json, console)
        else:
            show_live(url, interval, console)
    except ValueError as error:
        fail(error)
    except ScrapeError as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", highlight=False, markup=False
        )
        raise typer.Exit(1) from error
