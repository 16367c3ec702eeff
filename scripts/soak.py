"""Soak test: minutes of more load than stock vLLM sustains, with aborted requests.

Two servers run one after the other, stock vLLM first: each binds its threads to the
same cores. What stock sustains is the rate at which it finishes requests that come all
at once. Then both get the same requests at the same times, ``--rate-factor`` times as
many a second, in the same KV bytes: for MINUTES each, and then for as long as the queue
lasts. Prefix caching is whatever each side has by default.
"""

import asyncio
import math
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import typer
from checkout import commit
from rich.console import Console
from soak_load import (
    MAX_MODEL_LEN,
    Client,
    LoadRequest,
    draw_requests,
    pages,
    pages_leaked,
    send_all,
    session,
)
from soak_server import Sampler, as_flags, serve

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import NONE, num_pages
from pyramid_vllm.tools import options
from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.figures import Metric, side_table
from pyramid_vllm.tools.monitor.scrape import ScrapeError
from pyramid_vllm.tools.options import argument, command, option
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.sizes import format_bytes

BLOCK_SIZE = 32
#: Figures of one side's requests, as JSON holds them.
Figures = dict[str, Any]
#: Rows of the table; a dash stands for what the server did not report.
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


@dataclass(frozen=True)
class Settings:
    """Overload both servers; exit status 1 for an error or a leaked page."""

    minutes: float = argument("Of arrivals, on each side.", default=5.0)
    model: str | None = option(None, options.MODEL_NAME)
    policy: str = option("pyramid", options.POLICY)
    seed: int = option(0)
    stock_sequences: int = option(4, "KV memory, in stock's longest sequences.", min=1)
    rate_factor: float = option(1.5, "Requests a second, in those that stock sustains.")
    abort_share: float = option(0.15, min=0.0, max=1.0)
    json_file: Path | None = option(None, options.JSON_FILE, "--json")


@dataclass(frozen=True)
class Model:
    """A model, and the memory of so many of its longest sequences."""

    model: str
    vocab_size: int
    kv_bytes: int

    @staticmethod
    def of(folder: str, stock_sequences: int) -> "Model":
        """From the model's configuration."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        shape = ModelShape.of(config, "float32")
        (num,) = num_pages((MAX_MODEL_LEN,), BLOCK_SIZE)
        tokens = (num * stock_sequences + 1) * BLOCK_SIZE  # one page is the null page
        num_bytes = tokens * shape.token_bytes * shape.num_layers
        return Model(folder, config.get_text_config().vocab_size, num_bytes)

    def arguments(self, seed: int) -> list[str]:
        """Options of ``vllm serve``."""
        return as_flags(
            {
                "served_model_name": "model",
                "dtype": "float32",
                "enforce_eager": True,
                "block_size": BLOCK_SIZE,
                "max_model_len": MAX_MODEL_LEN,
                "max_num_seqs": 64,
                # Shorter than most prompts, so that these come in chunks.
                "max_num_batched_tokens": 256,
                "kv_cache_memory_bytes": self.kv_bytes,
                "seed": seed,
            }
        )


def is_sound(side: Figures) -> bool:
    """Whether every request ended as it should and left nothing in the pool."""
    num_well = side["num_finished"] + side["num_aborted"]
    return bool(side["num_sent"] == num_well and side["num_pages_leaked"] == 0)


async def soak(url: str, requests: list[LoadRequest], drain_s: float) -> Figures:
    """Put the load on a server.

    Returns:
        Counts of requests, of which we aborted some by closing their connections; pages
        in use with no request left, None if the server did not report them; most
        sequences in any sample and preemptions, None if it has ended; rates of finished
        requests and of their prompt and output tokens, from the first arrival to the
        last end.
    """
    async with session(url) as connection:
        client = Client(connection)
        await pages_leaked(connection, url)  # earlier requests have ended
        _, num_pages = pages(url)
        with Sampler(url) as sampler:
            seconds = await send_all(client, requests, drain_s)
        leaked = await pages_leaked(connection, url)
    counts = {}
    with suppress(ScrapeError):
        counts = {name: int(n) for name, n in sampler.figures().items()}
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


def sustained_rate(url: str, settings: Settings, model: Model) -> float:
    """Requests a second that the server sustains.

    Raises:
        RuntimeError: a request failed.
    """
    endless = draw_requests(0.0, model.vocab_size, settings.seed + 1, math.inf, 1.0)
    num = 25 * settings.stock_sequences
    found = asyncio.run(soak(url, list(islice(endless, num)), 3600.0))
    if found["errors"]:
        raise RuntimeError(f"stock has errors: {found['errors']}")
    return float(found["requests_per_s"])


def run_sides(
    settings: Settings, model: Model, logs: Path, console: Console
) -> tuple[dict[str, Figures], float]:
    """Both sides' figures, and what stock sustains.

    Raises:
        RuntimeError: a server did not start, or did not sustain anything.
    """
    sustained, seconds = 0.0, settings.minutes * 60
    requests: list[LoadRequest] = []
    sides = {}
    for name in ("stock", "policy"):
        extra = ["--kv-policy", settings.policy] if name == "policy" else []
        console.print(f"{name}: starting")
        arguments = model.arguments(settings.seed) + extra
        with serve(model.model, arguments, logs / f"{name}.log") as url:
            if name == "stock":
                sustained = sustained_rate(url, settings, model)
                console.print(f"stock sustains {sustained:.3f} requests/s")
                rate = settings.rate_factor * sustained
                shares = settings.abort_share, model.vocab_size
                requests = [*draw_requests(*shares, settings.seed, rate, seconds)]
            minutes = f"{settings.minutes:g} minutes"
            console.print(f"{name}: {len(requests)} requests in {minutes}")
            # The last requests have so many seconds after the last arrival.
            drain_s = 120.0 + 4.0 * seconds
            sides[name] = asyncio.run(soak(url, requests, drain_s))
    return sides, sustained


def report(settings: Settings, model: Model, console: Console, logs: Path) -> bool:
    """Run both sides, print and write their figures; whether the policy's are sound."""
    from vllm.platforms import current_platform

    sides, sustained = run_sides(settings, model, logs, console)
    by_policy = {NONE: sides["stock"], f"policy {settings.policy}": sides["policy"]}
    console.print(side_table(METRICS, by_policy))
    if settings.json_file is not None:
        conditions = {
            "stock": sides["stock"],
            "policy": settings.policy,
            "settings": asdict(settings) | asdict(model),
            "order": "one after the other, stock first",
            "stock_sustained_requests_per_s": sustained,
            "sent_requests_per_s": settings.rate_factor * sustained,
            "commit": commit(),
            "device": current_platform.get_device_name(),
        }
        write_report(settings.json_file, sides["policy"] | conditions, settings.seed)
    for side in sides.values():
        for error, count in side["errors"].items():
            console.print(f"{count} x {error}", markup=False)
    return is_sound(sides["policy"])


def run(settings: Settings) -> None:
    """Keep the servers' logs where something failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end first
    model = Model.of(settings.model or str(make_model()), settings.stock_sequences)
    console, logs = Console(), Path(tempfile.mkdtemp(prefix="pyramid-soak-"))
    console.print(f"{format_bytes(model.kv_bytes)} of KV memory")
    is_whole = False
    try:
        is_whole = report(settings, model, console, logs)
    except RuntimeError as error:
        console.print(f"failed: {error}", markup=False)
    finally:
        if is_whole:
            shutil.rmtree(logs)
        else:
            console.print(f"the servers' logs: {logs}", soft_wrap=True)
    raise typer.Exit(0 if is_whole else 1)


if __name__ == "__main__":
    typer.run(command(Settings, run))
