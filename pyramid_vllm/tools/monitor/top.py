"""``pyramid-vllm top``, once or until it is stopped."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from pyramid_vllm.tools.monitor.figures import Span, server_figures
from pyramid_vllm.tools.monitor.scrape import Scrape, ScrapeError, fetch, metrics_url
from pyramid_vllm.tools.monitor.settings import TopSettings
from pyramid_vllm.tools.monitor.view import picture
from pyramid_vllm.tools.options import fail


def run_top(settings: TopSettings) -> None:
    """Show pictures, or print one; a server without figures ends that with status 1.

    Raises:
        ValueError: the address is none, or pictures have no terminal.
    """
    console = Console(highlight=False)
    if not settings.once:
        show_live(settings.url, settings.interval, console)
        return
    try:
        server = one_interval(metrics_url(settings.url), settings.interval)
    except ScrapeError as error:
        fail(error, 1)
    if settings.as_json:
        console.file.write(json.dumps(server, indent=2) + "\n")
    else:
        console.print(picture(server))


def show_live(
    url: str,
    interval: float,
    console: Console,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show pictures until Ctrl-C."""
    if not console.is_terminal:
        raise ValueError(
            "the output is no terminal: valid is --once, with or without --json"
        )
    live = Live(console=console, screen=True, auto_refresh=False)
    with suppress(KeyboardInterrupt), live:
        for shown in pictures(metrics_url(url)):
            live.update(shown, refresh=True)
            sleep(interval)


def pictures(address: str) -> Iterator[RenderableType]:
    """A picture of each reading, or why there is none."""
    last = None
    while True:
        try:
            scrape = _read(address)
        except ScrapeError as error:
            yield Text(f"{time.strftime('%H:%M:%S')}  {error}", style="yellow")
            continue
        # What happened during an outage still counts: rates are means over it.
        yield picture({"url": address} | server_figures(Span(last, scrape)))
        last = scrape


def one_interval(address: str, interval: float) -> dict[str, Any]:
    """The figures of one interval; ``ScrapeError`` says why there are none."""
    before = _read(address)
    time.sleep(interval)
    return {"url": address} | server_figures(Span(before, _read(address)))


def _read(address: str) -> Scrape:
    """A reading of a server with a policy."""
    scrape = fetch(address)
    if not any(name.startswith("vllm:") for name in scrape.series):
        reason = "no vLLM metrics there: no vLLM server, or --disable-log-stats"
        raise ScrapeError(f"{address}: {reason}")
    if not any(name.startswith("vllm:kv_policy_") for name in scrape.series):
        reason = "vLLM without a KV policy: start it with --kv-policy"
        raise ScrapeError(f"{address}: {reason}")
    return scrape
