"""Load on one server: what requests look like, when they are sent, what became of them.

Every request is a streamed completion over a prompt of token ids. A share of them is
aborted by closing the connection after some seconds, wherever the request is by then:
queued, in its prompt, or streaming.
"""

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp

from pyramid_vllm.tools.monitor.scrape import ScrapeError, fetch, metrics_url

PROMPT_TOKENS = (64, 400)
OUTPUT_TOKENS = (16, 64)
MAX_MODEL_LEN = PROMPT_TOKENS[1] + OUTPUT_TOKENS[1]

#: Share of requests that begin with one of a few common prefixes, and these.
SHARED_SHARE, NUM_PREFIXES, PREFIX_TOKENS = 0.3, 4, 64

#: Earliest and latest time of an abort. Times are drawn evenly in their logarithm, so
#: that fast and slow servers both meet some at every stage of a request.
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
    abort_s: float | None = None
    """Seconds after which we close the connection; None: we do not."""


def draw_requests(
    abort_share: float, vocab_size: int, seed: int, rate: float, seconds: float
) -> Iterator[LoadRequest]:
    """Requests that arrive as a Poisson process.

    Args:
        abort_share: share of the requests that we abort.
        vocab_size: prompts are of random tokens below it.
        seed: the same seed draws the same requests.
        rate: mean requests a second; infinite: all come at once, without end.
        seconds: arrivals end here.
    """
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    prefixes = [tokens(PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]
    start_s = rng.expovariate(rate)
    while start_s < seconds:
        prompt = tokens(rng.randint(*PROMPT_TOKENS))
        if rng.random() < SHARED_SHARE:
            prompt[:PREFIX_TOKENS] = rng.choice(prefixes)
        max_tokens = rng.randint(*OUTPUT_TOKENS)
        first, last = map(math.log, ABORT_S)
        abort_s = math.exp(rng.uniform(first, last))
        is_aborted = rng.random() < abort_share
        abort = abort_s if is_aborted else None
        yield LoadRequest(start_s, prompt, max_tokens, abort)
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

    async def send(self, request: LoadRequest) -> None:
        """Send one request and follow it to its end."""
        self.num_sent += 1
        limit = asyncio.timeout(request.abort_s)
        try:
            async with limit:
                await self._stream(request)
        except asyncio.CancelledError:
            self.errors["not finished in time"] += 1
            raise
        except (aiohttp.ClientError, OSError, RequestFailed, ValueError) as error:
            if not limit.expired():
                self.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                return
            self.num_aborted += 1
        else:
            self.num_finished += 1
            self.num_tokens += len(request.prompt) + request.max_tokens

    async def _stream(self, request: LoadRequest) -> None:
        """Read the answer.

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
        num_tokens = 0
        async with self.session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                text = await response.text()
                raise RequestFailed(f"status {response.status}: {text}")
            async for line in response.content:
                data = line.removeprefix(b"data:").strip()
                if data in (b"", b"[DONE]"):
                    continue
                piece = json.loads(data)
                if "error" in piece:
                    raise RequestFailed(str(piece["error"]))
                if piece.get("usage"):
                    num_tokens = piece["usage"]["completion_tokens"]
        if num_tokens != request.max_tokens:
            raise RequestFailed(f"{num_tokens} of {request.max_tokens} tokens")


def session(url: str) -> aiohttp.ClientSession:
    """Connections without number or end."""
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
    )


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
