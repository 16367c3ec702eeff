"""One policy, one process: runs a batch through vLLM and counts what happens."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from pyramid_vllm.tools.bench.requests import Requests, Turn
from pyramid_vllm.tools.bench.watch import Measured, Watch
from pyramid_vllm.tools.engine_process import run_job


@dataclass(frozen=True)
class MeasureTask:
    """The engine and its requests, which are numbered turn by turn."""

    model: str
    turns: list[Turn]
    output_lengths: list[int]
    """Output tokens of each request."""
    engine_args: dict[str, Any]
    """Arguments of ``LLM``; others have vLLM's defaults, prefix caching too."""
    warm_up: bool = False
    """Whether a short batch runs first, uncounted."""

    @property
    def prompt_lengths(self) -> list[int]:
        """Prompt tokens of each request, with those of its conversation before it."""
        return Requests(self.turns, self.output_lengths, "").prompt_lengths


def measure(task: MeasureTask, advance: Callable[[int], None]) -> Measured:
    """Run a task in a process of its own.

    Args:
        task: what to run.
        advance: called with the number of finished requests.

    Raises:
        KVPolicyError: the engine refused the policy.
        RuntimeError: the process failed; the message ends with its last lines.
    """
    results: list[Any] = []
    offline = {"HF_HUB_OFFLINE": "1"}
    run_job(f"{__name__}:job", asdict(task), results.append, advance, offline)
    return Measured(**results[0])


def job(task: dict[str, Any], send: Callable[[str, Any], None]) -> None:
    """Run the task in this process and send its result."""
    found = MeasureTask(**task)
    engine = make_engine(found)
    if found.warm_up:
        warm_up(engine, found)
    send("done", 0)
    measured = run_batch(engine, found, lambda done: send("done", done))
    send("result", asdict(measured))


def make_engine(task: MeasureTask) -> Any:
    """A vLLM engine in this process, so that its scheduler can be watched."""
    import pyramid_vllm  # noqa: F401, I001 (lets `LLM` take a KV policy)
    from vllm import LLM

    return LLM(task.model, **task.engine_args).llm_engine


def add_request(engine: Any, name: str, prompt: list[int], num_tokens: int) -> None:
    """Queue a greedy request of a fixed length."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=num_tokens,
        ignore_eos=True,
        # An engine without a tokenizer cannot detokenize.
        detokenize=engine.tokenizer is not None,
    )
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def warm_up(engine: Any, task: MeasureTask) -> None:
    """Run a short batch, so that all that is made or compiled on first use is there.

    Raises:
        RuntimeError: the batch is still in the prefix cache, where the measured one
            would find it.
    """
    # A whole prompt, because policies do not evict short ones, and a short one.
    whole = min(task.turns[0], key=len)
    for name, prompt in (("0", whole), ("1", whole[:32])):
        add_request(engine, name, prompt, 4)
    while engine.has_unfinished_requests():
        engine.step()
    if not engine.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be emptied after the warm-up")


class _Batch:
    """Conversations of which each sends its next request when an answer is complete.

    Conversation ``i`` of ``n`` has the requests ``i``, ``n + i``, ``2 * n + i`` and so
    on. Times are in seconds of steps.
    """

    def __init__(self, engine: Any, task: MeasureTask) -> None:
        self._engine, self._lengths = engine, task.output_lengths
        self._parts = list(chain(*task.turns))
        self._num = len(task.turns[0])
        self._histories: list[list[int]] = [[] for _ in range(self._num)]
        self.sent: dict[int, float] = {}
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.outputs: dict[int, list[int]] = {}
        self.num_cached = 0
        """Prompt tokens that were found in the prefix cache."""
        for number in range(self._num):
            self._send(number, 0.0)

    def _send(self, number: int, now: float) -> None:
        self.sent[number] = now
        history = self._histories[number % self._num]
        history += self._parts[number]
        length = self._lengths[number]
        add_request(self._engine, str(number), list(history), length)

    def take(self, news: list[Any], now: float) -> None:
        """Note what a step gave, and send what follows."""
        for output in news:
            number = int(output.request_id)
            self.first.setdefault(number, now)
            if not output.finished:
                continue
            self.last[number] = now
            self.outputs[number] = list(output.outputs[0].token_ids)
            self.num_cached += output.num_cached_tokens or 0
            self._histories[number % self._num] += self.outputs[number]
            if number + self._num < len(self._parts):
                self._send(number + self._num, now)

    def since_sent(self, times: dict[int, float]) -> list[float]:
        """Times counted from when each request was sent."""
        return [times[number] - self.sent[number] for number in sorted(self.sent)]


def run_batch(
    engine: Any, task: MeasureTask, progress: Callable[[int], None]
) -> Measured:
    """Run all conversations at once, greedily.

    Args:
        engine: from ``make_engine``.
        task: the prompts and their output lengths.
        progress: called with the number of finished requests after every step.
    """
    watch = Watch(engine.engine_core.engine_core)
    batch = _Batch(engine, task)
    seconds = 0.0
    with watch.counting_rows():
        while engine.has_unfinished_requests():
            # Only steps are timed: watching a policy takes longer than watching stock.
            start = time.perf_counter()
            news = engine.step()
            seconds += time.perf_counter() - start
            batch.take(news, seconds)
            watch.step()
            progress(len(batch.outputs))
    num_prompt_tokens = sum(task.prompt_lengths)
    outputs = [batch.outputs[number] for number in sorted(batch.sent)]
    return Measured(
        **watch.counts(),
        seconds=seconds,
        total_tokens_per_s=(num_prompt_tokens + sum(map(len, outputs))) / seconds,
        prefix_caching=bool(engine.vllm_config.cache_config.enable_prefix_caching),
        prefix_hit_rate=batch.num_cached / num_prompt_tokens,
        first_token_s=batch.since_sent(batch.first),
        finish_s=batch.since_sent(batch.last),
        outputs=outputs,
    )
