"""One policy, one process: runs a batch through vLLM and counts what happens.

Run as ``python -m pyramid_vllm.bench.measure``, with a ``MeasureTask`` as JSON on its
standard input. It tells ``ready``, then ``done`` with the finished requests after every
step, then ``result``.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from pyramid_vllm.engine_process import leave, read_task, tell


@dataclass(frozen=True)
class MeasureTask:
    """What to run."""

    model: str
    prompts: list[list[int]]
    output_tokens: int | list[int]
    """Of every request, or of each."""
    kv_bytes: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_policy: str | None
    seed: int
    dtype: str = "float32"
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Of ``LLM``; they replace the ones that are set here."""
    warm_up: bool = False
    """Whether a short batch runs first, uncounted."""

    @property
    def output_lengths(self) -> list[int]:
        """Of each request."""
        if isinstance(self.output_tokens, int):
            return [self.output_tokens] * len(self.prompts)
        return self.output_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(
            map(sum, zip(map(len, self.prompts), self.output_lengths, strict=True))
        )


@dataclass
class Measured:
    """What one policy did."""

    kv_bytes_per_request: float = 0.0
    """Mean over requests of the KV bytes held in their last step."""
    max_num_running: int = 0
    mean_num_running: float = 0.0
    num_preemptions: int = 0
    num_pages_freed: int = 0
    num_compactions: int = 0
    num_rows_scheduled: int = 0
    """Rows of the first layer: what stock vLLM would have computed in every layer."""
    num_rows_computed: float = 0.0
    """Rows that layers computed, mean over layers."""
    total_tokens_per_s: float = 0.0
    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    """Of each request, from the start of the batch, when all arrive."""
    finish_s: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)


def make_engine(task: MeasureTask) -> Any:
    """A vLLM engine in this process, so that its scheduler can be watched."""
    import pyramid_vllm  # noqa: F401, I001 (lets `LLM` take a KV policy)
    from vllm import LLM

    settings: dict[str, Any] = {
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "block_size": task.block_size,
        "max_model_len": task.longest,
    }
    return LLM(
        model=task.model,
        dtype=task.dtype,
        kv_cache_memory_bytes=task.kv_bytes,
        max_num_seqs=task.max_num_seqs,
        max_num_batched_tokens=task.max_num_batched_tokens,
        seed=task.seed,
        kv_policy=task.kv_policy,
        **(settings | task.engine_args),
    ).llm_engine


class Watch:
    """Follows a scheduler and its worker from step to step, stock or not."""

    def __init__(self, core: Any) -> None:
        from pyramid_vllm.spec import group_page_bytes

        self._core = core
        self._page_bytes = group_page_bytes(core.scheduler.kv_cache_config)
        self._last_bytes: dict[str, int] = {}
        self._preemptions: dict[str, int] = {}
        self._running: list[int] = []
        self._num_scheduled = 0
        self._before = self._counts()

    @contextmanager
    def counting_rows(self) -> Iterator[None]:
        """Count what the scheduler gives to steps."""
        scheduler = self._core.scheduler
        schedule = scheduler.schedule

        def counting(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._num_scheduled += output.total_num_scheduled_tokens
            return output

        scheduler.schedule = counting
        try:
            yield
        finally:
            scheduler.schedule = schedule

    def step(self) -> None:
        """Look at the scheduler between two steps."""
        scheduler = self._core.scheduler
        self._running.append(len(scheduler.running))
        for request in scheduler.requests.values():
            self._preemptions[request.request_id] = request.num_preemptions
            if request.num_computed_tokens > request.num_prompt_tokens:
                ids = scheduler.kv_cache_manager.get_block_ids(request.request_id)
                held = sum(map(len, ids)) * self._page_bytes
                self._last_bytes[request.request_id] = held

    def _counts(self) -> tuple[int, int, float]:
        """Compactions, freed pages and pruned rows a layer, since start-up."""
        counters = getattr(self._core.scheduler, "kv_counters", None)
        if counters is None:
            return 0, 0, 0.0
        rows = self._core.model_executor.driver_worker.worker.tier_state.counters
        pruned = rows.num_scheduled - float(rows.num_computed.mean())
        return counters.num_compactions, counters.num_pages_freed, pruned

    def result(self) -> Measured:
        """The counts so far."""
        compactions, freed, pruned = (
            now - before
            for now, before in zip(self._counts(), self._before, strict=True)
        )
        held = self._last_bytes.values()
        return Measured(
            kv_bytes_per_request=sum(held) / max(1, len(held)),
            max_num_running=max(self._running, default=0),
            mean_num_running=sum(self._running) / max(1, len(self._running)),
            num_preemptions=sum(self._preemptions.values()),
            num_pages_freed=int(freed),
            num_compactions=int(compactions),
            num_rows_scheduled=self._num_scheduled,
            num_rows_computed=self._num_scheduled - pruned,
        )


def add_requests(
    engine: Any, prompts: list[list[int]], output_lengths: list[int]
) -> None:
    """Queue greedy requests of fixed lengths, named by their numbers."""
    from vllm import SamplingParams

    # Without a tokenizer there is nothing to detokenize with.
    detokenize = engine.tokenizer is not None
    for index, (prompt, length) in enumerate(zip(prompts, output_lengths, strict=True)):
        sampling = SamplingParams(
            temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=detokenize
        )
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)


def warm_up(engine: Any, task: MeasureTask) -> None:
    """Run a short batch: what is made or compiled on first use then is."""
    # A whole prompt, for policies keep short ones whole; beside it another request.
    whole = min(task.prompts, key=len)
    add_requests(engine, [whole, whole[:32]], [4, 4])
    while engine.has_unfinished_requests():
        engine.step()


def run_batch(
    engine: Any, task: MeasureTask, progress: Callable[[int], None]
) -> Measured:
    """Run all prompts at once, greedily.

    Args:
        engine: from ``make_engine``.
        task: the prompts and their output lengths.
        progress: told the finished requests after every step.
    """
    watch = Watch(engine.engine_core.engine_core)
    add_requests(engine, task.prompts, task.output_lengths)
    outputs: dict[str, list[int]] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    seconds = 0.0
    with watch.counting_rows():
        while engine.has_unfinished_requests():
            # Steps alone are timed: a policy has more pages to look at than stock.
            start = time.perf_counter()
            news = engine.step()
            seconds += time.perf_counter() - start
            for output in news:
                first.setdefault(output.request_id, seconds)
                if output.finished:
                    outputs[output.request_id] = list(output.outputs[0].token_ids)
                    last[output.request_id] = seconds
            watch.step()
            progress(len(outputs))
    names = [str(index) for index in range(len(task.prompts))]
    result = watch.result()
    result.outputs = [outputs[name] for name in names]
    result.first_token_s = [first[name] for name in names]
    result.finish_s = [last[name] for name in names]
    tokens = sum(map(len, task.prompts)) + sum(map(len, result.outputs))
    result.seconds = seconds
    result.total_tokens_per_s = tokens / seconds
    return result


def main() -> None:
    """Entry point of the child process."""
    task = MeasureTask(**read_task())
    engine = make_engine(task)
    if task.warm_up:
        warm_up(engine, task)
    tell("ready", True)
    measured = run_batch(engine, task, lambda done: tell("done", done))
    tell("result", asdict(measured))
    leave()


if __name__ == "__main__":
    main()
