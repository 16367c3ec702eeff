"""``pyramid-vllm top``, once or until it is stopped."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pyramid_vllm.tools.monitor.figures import Span, server_figures
from pyramid_vllm.tools.monitor.scrape import Scrape, ScrapeError, fetch, metrics_url
from pyramid_vllm.tools.monitor.view import picture, title


def refusal(scrape: Scrape) -> str | None:
    """Why a reading shows nothing of a policy."""
    if not scrape.has("vllm:"):
        return "no vLLM metrics there: no vLLM server, or --disable-log-stats"
    if not scrape.has("vllm:kv_policy_"):
        return "vLLM without a KV policy: start it with --kv-policy"
    return None


def show_once(url: str, interval: float, as_json: bool, console: Console) -> None:
    """Print one picture, or the figures as JSON, of one interval.

    Raises:
        ScrapeError: there is none; the message says why.
    """
    address, scrapes = metrics_url(url), []
    for index in range(2):
        time.sleep(interval if index else 0)
        try:
            scrapes.append(fetch(address))
        except ScrapeError as error:
            raise ScrapeError(f"{address}: {error}") from error
        reason = refusal(scrapes[-1])
        if reason:
            raise ScrapeError(f"{address}: {reason}")
    server = server_figures(Span(*scrapes))
    if as_json:
        content = {"url": address} | asdict(server)
        console.file.write(json.dumps(content, indent=2) + "\n")
    else:
        console.print(picture(console, url, server))


class Watch:
    """Readings of one server, one after the other, each as a picture."""

    def __init__(self, url: str, console: Console) -> None:
        self._url, self._address = url, metrics_url(url)
        self._console = console
        self._last: Scrape | None = None
        self._silent_since: str | None = None

    def next_picture(self) -> RenderableType:
        """Read once more; says so where the server is gone or has no policy."""
        try:
            scrape = fetch(self._address)
        except ScrapeError as error:
            self._silent_since = self._silent_since or time.strftime("%H:%M:%S")
            return self._words(f"no answer since {self._silent_since}: {error}")
        self._silent_since = None
        reason = refusal(scrape)
        if reason:
            self._last = None
            return self._words(reason)
        # What happened during an outage still counts: rates are means over it.
        server = server_figures(Span(self._last, scrape))
        self._last = scrape
        return picture(self._console, self._url, server, self._console.height)

    def _words(self, words: str) -> RenderableType:
        head = title(self._console, self._url, "waiting")
        return Group(head, Text(), Text(words, style="yellow"))


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
    watch = Watch(url, console)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(watch.next_picture(), refresh=True)
                sleep(interval)
    except KeyboardInterrupt:
        return
