"""``pyramid-vllm top``: what a server's policy does, live."""

from dataclasses import dataclass

from rich.console import Console

from pyramid_vllm.tools.options import argument, fail, option


@dataclass(frozen=True)
class TopSettings:
    """Show what the KV policy of a running server does, until Ctrl-C."""

    url: str = argument(
        "A vLLM server, with or without /metrics.", default="http://127.0.0.1:8000"
    )
    interval: float = option(2.0, "Seconds between two readings.")
    once: bool = option(False, "Print one picture, of one interval.", "--once")
    as_json: bool = option(False, "With --once: the figures as JSON.", "--json")


def run_top(settings: TopSettings) -> None:
    """Show pictures, or print one; a server without figures ends it with status 1.

    Raises:
        ValueError: an option is not valid.
    """
    from pyramid_vllm.tools.monitor.scrape import ScrapeError
    from pyramid_vllm.tools.monitor.watch import show_live, show_once

    console, interval = Console(highlight=False), settings.interval
    if not 0.1 <= interval <= 3600:
        raise ValueError(f"'--interval' is {interval}: valid are 0.1 to 3600 seconds")
    if settings.as_json and not settings.once:
        raise ValueError("'--json' is given: valid only with --once")
    try:
        if settings.once:
            show_once(settings.url, interval, settings.as_json, console)
        else:
            show_live(settings.url, interval, console)
    except ScrapeError as error:
        fail(error, 1)
