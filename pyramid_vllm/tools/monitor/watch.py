"""``pyramid-vllm top``, once or until it is stopped."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pyramid_vllm.tools.monitor.figures import ServerFigures, server_figures
from pyramid_vllm.tools.monitor.scrape import Scrape, ScrapeError, fetch, metrics_url
from pyramid_vllm.tools.monitor.span import Span
from pyramid_vllm.tools.monitor.view import picture, title

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.1, 3600.0


@dataclass(frozen=True)
class TopSettings:
    """The options of the command."""

    url: str = "http://127.0.0.1:8000"
    interval: float = 2.0
    once: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        metrics_url(self.url)
        if not MIN_INTERVAL_S <= self.interval <= MAX_INTERVAL_S:
            raise ValueError(
                f"'--interval' is {self.interval}: valid are {MIN_INTERVAL_S} to "
                f"{MAX_INTERVAL_S:.0f} seconds"
            )
        if self.as_json and not self.once:
            raise ValueError("'--json' is given: valid only with --once")

    @property
    def address(self) -> str:
        return metrics_url(self.url)


def refusal(scrape: Scrape) -> str | None:
    """Why there is nothing of ours to show."""
    if not scrape.has_vllm:
        return "no vLLM metrics there: no vLLM server, or --disable-log-stats"
    if not scrape.has_policy:
        return "vLLM without a KV policy: start it with --kv-policy"
    return None


def show_once(settings: TopSettings, console: Console) -> None:
    """Print one picture, of one interval.

    Raises:
        ScrapeError: If there is none, and why.
    """
    scrapes = []
    for index in range(2):
        time.sleep(settings.interval if index else 0)
        try:
            scrapes.append(fetch(settings.address))
        except ScrapeError as error:
            raise ScrapeError(f"{settings.address}: {error}") from error
        reason = refusal(scrapes[-1])
        if reason:
            raise ScrapeError(f"{settings.address}: {reason}")
    server = server_figures(Span(*scrapes))
    if settings.as_json:
        console.file.write(json.dumps(as_json(settings, server), indent=2) + "\n")
    else:
        console.print(picture(console, settings.url, server))


def as_json(settings: TopSettings, server: ServerFigures) -> dict[str, Any]:
    """All figures, by the names of the fields."""
    return {"url": settings.address} | asdict(server)


class Watch:
    """Readings of one server, one after the other, each as a picture."""

    def __init__(self, settings: TopSettings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._last: Scrape | None = None
        self._silent_since: str | None = None

    def next_picture(self) -> RenderableType:
        """Read once more. That a server is gone, or has no policy, is said."""
        try:
            scrape = fetch(self._settings.address)
        except ScrapeError as error:
            self._silent_since = self._silent_since or time.strftime("%H:%M:%S")
            return self._words(f"no answer since {self._silent_since}: {error}")
        self._silent_since = None
        # What lies behind an outage still counts: rates are means over it.
        before, self._last = self._last, scrape
        reason = refusal(scrape)
        if reason:
            self._last = None
            return self._words(reason)
        server = server_figures(Span(before, scrape))
        return picture(self._console, self._settings.url, server, self._console.height)

    def _words(self, words: str) -> RenderableType:
        head = title(self._console, self._settings.url, "waiting")
        return Group(head, Text(), Text(words, style="yellow"))


def show_live(
    settings: TopSettings,
    console: Console,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show pictures until Ctrl-C."""
    if not console.is_terminal:
        raise ValueError(
            "the output is no terminal: valid is --once, with or without --json"
        )
    watch = Watch(settings, console)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(watch.next_picture(), refresh=True)
                sleep(settings.interval)
    except KeyboardInterrupt:
        return
