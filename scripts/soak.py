"""Soak test: minutes of more load than stock vLLM sustains, with aborted requests.

Two servers, one after the other, stock vLLM first: each binds its threads to the same
cores. Stock is asked first what it sustains, by clients that each send one request at a
time. Then both get the same requests at the same times, ``--rate-factor`` times as many
a second, in the same KV bytes: ``--minutes`` each, and then for as long as the queue
lasts. Prefix caching is whatever each side has by default.
"""

import asyncio
import math
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from checkout import commit
from rich.console import Console
from soak_load import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    Client,
    LoadRequest,
    Settings,
    pages,
    pages_leaked,
    send_all,
    sustained_rate,
)
from soak_server import Sampler, serve

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import NONE, num_pages
from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.figures import Metric, side_table
from pyramid_vllm.tools.monitor.scrape import ScrapeError
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.sizes import format_bytes

#: Bound of the wait for the last requests, and its part in the time of arrivals.
DRAIN_S, DRAIN_FACTOR = 120.0, 4.0

#: Shortest time in which stock's requests are counted, and the clients that keep it
#: busy, for every stock sequence that the memory holds.
CALIBRATION_S, CLIENTS_PER_SEQUENCE = 45.0, 3

#: What became of one side's requests, as JSON holds it.
Figures = dict[str, Any]
#: Rows of the table; a dash is what the server did not report.
METRICS = [
    Metric("num_sent", "requests sent"),
    Metric("num_finished", "finished"),
    Metric("num_aborted", "aborted by us"),
    Metric("num_errors", "errors"),
    Metric("num_pages_leaked", "pages leaked"),
    Metric("num_pages", "  of"),
    Metric("max_num_running", "most sequences at once"),
    Metric("num_preemptions", "preemptions"),
    Metric("requests_per_s", "finished requests/s", ".3f"),
    Metric("tokens_per_s", "their tokens/s, prompt and output", ".1f"),
    Metric("seconds", "seconds to the last end"),
]


def is_sound(side: Figures) -> bool:
    """Whether every request ended as it should and left nothing behind."""
    ended = side["num_finished"] + side["num_aborted"] + side["num_errors"]
    all_ended = side["num_sent"] == ended and side["num_errors"] == 0
    return all_ended and side["num_pages_leaked"] == 0


def session(url: str) -> aiohttp.ClientSession:
    """Connections without number or end."""
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
    )


async def calibrate(url: str, settings: Settings) -> float:
    """Requests a second that the server sustains."""
    requests = settings.requests(settings.seed + 1, 1.0, math.inf)
    num_clients = CLIENTS_PER_SEQUENCE * settings.stock_sequences
    seconds = max(CALIBRATION_S, settings.minutes * 60 / 4)
    async with session(url) as connection:
        return await sustained_rate(Client(connection), requests, num_clients, seconds)


async def soak(url: str, requests: list[LoadRequest], drain_s: float) -> Figures:
    """Put the load on a server.

    Returns:
        Counts of requests, of which we aborted some by closing their connections; pages
        in use with no request left, None if the server did not say; most sequences in
        any sample and preemptions, None if it has ended; rates of finished requests and
        of their prompt and output tokens, from the first arrival to the last end.
    """
    async with session(url) as connection:
        client = Client(connection)
        await pages_leaked(connection, url)  # what came before has ended
        _, num_pages = pages(url)
        with Sampler(url) as sampler:
            seconds = await send_all(client, requests, drain_s)
        leaked = await pages_leaked(connection, url)
        try:
            counts = {name: int(n) for name, n in sampler.figures().items()}
        except ScrapeError:
            counts = {}
    return {
        "num_sent": client.num_sent,
        "num_finished": client.num_finished,
        "num_aborted": client.num_aborted,
        "num_errors": client.errors.total(),
        "num_pages_leaked": leaked,
        "max_num_running": counts.get("max_num_running"),
        "num_preemptions": counts.get("num_preemptions"),
        "num_pages": num_pages,
        "requests_per_s": client.num_finished / seconds,
        "tokens_per_s": client.num_tokens / seconds,
        "seconds": seconds,
        "errors": dict(client.errors),
    }


def run_sides(
    settings: Settings, policy: str, logs: Path, console: Console
) -> tuple[dict[str, Figures], float]:
    """Both sides' figures, and what stock sustains.

    Raises:
        RuntimeError: a server did not start, or did not sustain anything.
    """
    seconds, sustained = settings.minutes * 60, 0.0
    requests: list[LoadRequest] = []
    sides = {}
    for name in ("stock", "policy"):
        extra = ["--kv-policy", policy] if name == "policy" else []
        console.print(f"{name}: starting")
        log = logs / f"{name}.log"
        with serve(settings.model, settings.arguments() + extra, log) as url:
            if name == "stock":
                sustained = asyncio.run(calibrate(url, settings))
                rate = settings.rate_factor * sustained
                console.print(f"stock sustains {sustained:.3f} requests/s")
                requests = list(settings.requests(settings.seed, rate, seconds))
            console.print(
                f"{name}: {len(requests)} requests in {settings.minutes:g} minutes"
            )
            drain_s = DRAIN_S + DRAIN_FACTOR * seconds
            sides[name] = asyncio.run(soak(url, requests, drain_s))
    return sides, sustained


def report(
    settings: Settings, sides: dict[str, Figures], policy: str, sustained: float
) -> dict[str, Any]:
    """The result, as JSON can hold it: the policy's figures, stock's below them."""
    from vllm.platforms import current_platform

    figures = sides["policy"] | {"stock": sides["stock"]}
    conditions = {
        "policy": policy,
        "settings": asdict(settings),
        "order": "one after the other, stock first",
        "stock_sustained_requests_per_s": sustained,
        "sent_requests_per_s": settings.rate_factor * sustained,
        "commit": commit(),
        "device": current_platform.get_device_name(),
    }
    return figures | conditions


def make_settings(model: str, stock_sequences: int, **options: Any) -> Settings:
    """Settings with the memory of ``stock_sequences`` longest sequences."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    shape = ModelShape.of(config, "float32")
    (pages,) = num_pages((MAX_MODEL_LEN,), BLOCK_SIZE)
    tokens = (pages * stock_sequences + 1) * BLOCK_SIZE  # one page is the null page
    return Settings(
        model=model,
        stock_sequences=stock_sequences,
        vocab_size=config.get_text_config().vocab_size,
        kv_bytes=tokens * shape.token_bytes * shape.num_layers,
        **options,
    )


def main(
    minutes: Annotated[float, typer.Argument(help="Of arrivals, on each side.")] = 5.0,
    minutes_option: Annotated[
        float | None, typer.Option("--minutes", help="The same.")
    ] = None,
    model: Annotated[str | None, typer.Option()] = None,
    policy: Annotated[str, typer.Option()] = "pyramid",
    seed: Annotated[int, typer.Option()] = 0,
    stock_sequences: Annotated[
        int, typer.Option(min=1, help="KV memory, in stock's longest sequences.")
    ] = 4,
    rate_factor: Annotated[
        float, typer.Option(help="Requests a second, in those that stock sustains.")
    ] = 1.5,
    abort_share: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.15,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Overload both servers; exit status 1 for an error or a leaked page."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end first
    settings = make_settings(
        model or str(make_model()),
        stock_sequences,
        minutes=minutes if minutes_option is None else minutes_option,
        rate_factor=rate_factor,
        abort_share=abort_share,
        seed=seed,
    )
    console, logs = Console(), Path(tempfile.mkdtemp(prefix="pyramid-soak-"))
    console.print(f"{format_bytes(settings.kv_bytes)} of KV memory")
    is_whole = False
    try:
        sides, sustained = run_sides(settings, policy, logs, console)
        by_policy = {NONE: sides["stock"], f"policy {policy}": sides["policy"]}
        console.print(side_table(METRICS, by_policy))
        if json_file is not None:
            result = report(settings, sides, policy, sustained)
            write_report(json_file, result, settings.seed)
        is_whole = is_sound(sides["policy"])
        for side in sides.values():
            for error, count in side["errors"].items():
                console.print(f"{count} x {error}", markup=False)
    except RuntimeError as error:
        console.print(f"failed: {error}", markup=False)
    finally:
        if is_whole:
            shutil.rmtree(logs)
        else:
            console.print(f"the servers' logs: {logs}", soft_wrap=True)
    raise typer.Exit(0 if is_whole else 1)


if __name__ == "__main__":
    typer.run(main)
