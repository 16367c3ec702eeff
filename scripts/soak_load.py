"""Load on one server: what requests look like, when they are sent, what became of them.

Every request is a streamed completion over a prompt of token ids. A share of them is
aborted by closing the connection: half of these after some of their tokens, half after
some seconds, wherever the request is by then (queued, in its prompt, or streaming).
"""

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from soak_server import as_flags

from pyramid_vllm.tools.monitor.scrape import ScrapeError, fetch, metrics_url

PROMPT_TOKENS = (64, 400)
OUTPUT_TOKENS = (16, 64)
MAX_MODEL_LEN = PROMPT_TOKENS[1] + OUTPUT_TOKENS[1]
BLOCK_SIZE = 32
MAX_NUM_SEQS = 64
#: Shorter than most prompts, so that these come in chunks.
MAX_CHUNK = 256

#: Share of requests that begin with one of a few common prefixes, and these.
SHARED_SHARE, NUM_PREFIXES, PREFIX_TOKENS = 0.3, 4, 64

#: Earliest and latest time of an abort by time; drawn evenly in its logarithm, so that
#: fast and slow servers both meet some at every stage of a request.
ABORT_S = (0.05, 20.0)

METRICS_WITHIN_S = 30.0


class RequestFailed(Exception):
    """The server did not answer a request as it should."""


@dataclass(frozen=True)
class LoadRequest:
    """One request, decided before it is sent."""

    start_s: float
    """When to send it, from the start of the load."""
    prompt: list[int]
    max_tokens: int
    abort_pieces: int | None = None
    """Streamed pieces after which we close the connection."""
    abort_s: float | None = None
    """Seconds after which we close it."""


@dataclass(frozen=True)
class Settings:
    """What both sides share."""

    model: str
    minutes: float
    rate_factor: float
    abort_share: float
    stock_sequences: int
    seed: int
    vocab_size: int
    kv_bytes: int

    def arguments(self) -> list[str]:
        """Options of ``vllm serve``."""
        return as_flags(
            {
                "served_model_name": "model",
                "dtype": "float32",
                "enforce_eager": True,
                "block_size": BLOCK_SIZE,
                "max_model_len": MAX_MODEL_LEN,
                "max_num_seqs": MAX_NUM_SEQS,
                "max_num_batched_tokens": MAX_CHUNK,
                "kv_cache_memory_bytes": self.kv_bytes,
                "seed": self.seed,
            }
        )

    def requests(self, seed: int, rate: float, seconds: float) -> Iterator[LoadRequest]:
        """Requests that arrive as a Poisson process.

        Args:
            seed: the same seed draws the same requests.
            rate: mean requests a second.
            seconds: arrivals end here.
        """
        rng = random.Random(seed)

        def tokens(count: int) -> list[int]:
            return [rng.randrange(self.vocab_size) for _ in range(count)]

        prefixes = [tokens(PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]
        start_s = rng.expovariate(rate)
        while start_s < seconds:
            prompt = tokens(rng.randint(*PROMPT_TOKENS))
            if rng.random() < SHARED_SHARE:
                prompt[:PREFIX_TOKENS] = rng.choice(prefixes)
            max_tokens = rng.randint(*OUTPUT_TOKENS)
            abort: dict[str, Any] = {}
            if rng.random() < self.abort_share:
                if rng.random() < 0.5:
                    abort = {"abort_pieces": rng.randint(1, max_tokens - 1)}
                else:
                    first, last = map(math.log, ABORT_S)
                    abort = {"abort_s": math.exp(rng.uniform(first, last))}
            yield LoadRequest(start_s, prompt, max_tokens, **abort)
            start_s += rng.expovariate(rate)


@dataclass
class Client:
    """Sends requests to one server and counts what became of them."""

    session: aiohttp.ClientSession
    num_sent: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_tokens: int = 0
    """Prompt and output tokens of finished requests."""
    errors: Counter[str] = field(default_factory=Counter)
    end_times: list[float] = field(default_factory=list)
    """When each request ended that ended by itself or was aborted by us."""

    async def send(self, request: LoadRequest) -> None:
        """Send one request and follow it to its end."""
        self.num_sent += 1
        limit = asyncio.timeout(request.abort_s)
        try:
            async with limit:
                is_whole = await self._stream(request)
        except asyncio.CancelledError:
            self.errors["not finished in time"] += 1
            raise
        except (aiohttp.ClientError, OSError, RequestFailed, ValueError) as error:
            if not limit.expired():
                self.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                return
            is_whole = False
        self.end_times.append(time.monotonic())
        if is_whole:
            self.num_finished += 1
            self.num_tokens += len(request.prompt) + request.max_tokens
        else:
            self.num_aborted += 1

    async def _stream(self, request: LoadRequest) -> bool:
        """Read the answer; returns False where we close the connection first.

        Raises:
            RequestFailed: the answer is an error, or not all that was asked for.
        """
        body = {
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        num_pieces, num_tokens = 0, 0
        async with self.session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                text = await response.text()
                raise RequestFailed(f"status {response.status}: {text}")
            async for line in response.content:
                data = line.removeprefix(b"data:").strip()
                if not data:
                    continue
                if data == b"[DONE]":
                    break
                piece = json.loads(data)
                if "error" in piece:
                    raise RequestFailed(str(piece["error"]))
                if piece["choices"]:
                    num_pieces += 1
                    if num_pieces == request.abort_pieces:
                        response.close()
                        return False
                else:
                    num_tokens = piece["usage"]["completion_tokens"]
        if num_tokens != request.max_tokens:
            raise RequestFailed(f"{num_tokens} of {request.max_tokens} tokens")
        return True


async def sustained_rate(
    client: Client, requests: Iterator[LoadRequest], num_clients: int, seconds: float
) -> float:
    """Requests a second with ``num_clients`` clients that each send one at a time.

    Clients start together, so each one's first request goes uncounted; the rest takes
    ``seconds`` or longer, until enough have ended.

    Raises:
        RuntimeError: a request failed, or too few ended.
    """

    async def send_in_turn() -> None:
        for request in requests:
            await client.send(request)

    start, times = time.monotonic(), client.end_times
    tasks = [asyncio.create_task(send_in_turn()) for _ in range(num_clients)]
    while len(times) < 3 * num_clients or time.monotonic() - start < seconds:
        await asyncio.sleep(0.5)
        if client.errors or time.monotonic() - start > 10 * seconds:
            raise RuntimeError(
                f"{len(times)} requests ended in {time.monotonic() - start:.0f} s, "
                f"errors: {dict(client.errors)}"
            )
    counted = times[num_clients - 1 :]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return (len(counted) - 1) / (counted[-1] - counted[0])


async def send_all(
    client: Client, requests: list[LoadRequest], drain_s: float
) -> float:
    """Send every request when its time comes, whatever became of those before it.

    What has not ended ``drain_s`` after the last one was sent is an error.

    Returns:
        Seconds from the start to the end of the last request.
    """
    start = time.monotonic()
    tasks = []
    for request in requests:
        await asyncio.sleep(start + request.start_s - time.monotonic())
        tasks.append(asyncio.create_task(client.send(request)))
    _, late = await asyncio.wait(tasks, timeout=drain_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return time.monotonic() - start


def pages(url: str) -> tuple[float, int]:
    """Pages of the server in use, and all.

    Raises:
        ScrapeError: the server does not answer.
        KeyError: its answer lacks a metric.
    """
    series = fetch(metrics_url(url), METRICS_WITHIN_S).series
    (labels,) = series["vllm:cache_config_info"]
    num_pages = int(dict(labels)["num_gpu_blocks"]) - 1  # one is the null page
    (usage,) = series["vllm:kv_cache_usage_perc"].values()
    return usage * num_pages, num_pages


async def pages_leaked(
    session: aiohttp.ClientSession, url: str, wait_s: float = 30.0
) -> int | None:
    """Pages still in use with no request left; None where the server says nothing.

    The server updates its figures only with a step, so one token is asked for first.
    """
    deadline = time.monotonic() + wait_s
    while True:
        probe = Client(session)
        try:
            await probe.send(LoadRequest(0.0, [1], 1, abort_s=wait_s))
            used, _ = await asyncio.to_thread(pages, url)
        except (ScrapeError, KeyError):
            return None
        if used == 0 or time.monotonic() > deadline:
            # Rounded up, so that a trace of a page is not rounded away.
            return math.ceil(used - 1e-6) if probe.num_finished else None
        await asyncio.sleep(1)
