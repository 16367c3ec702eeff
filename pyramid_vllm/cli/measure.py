"""One policy, one process: runs a batch through vLLM and counts what happens.

Run as ``python -m pyramid_vllm.cli.measure``, with a ``MeasureTask`` as JSON on its
standard input. It prints JSON objects, each on a line of its own behind ``MARK``:
``ready``, then ``done`` with the finished requests after every step, then ``result``.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

MARK = "@pyramid-vllm "


@dataclass(frozen=True)
class MeasureTask:
    """What to run."""

    model: str
    prompts: list[list[int]]
    output_tokens: int
    kv_bytes: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_policy: str | None
    seed: int


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
    total_tokens_per_s: float = 0.0
    seconds: float = 0.0
    outputs: list[list[int]] = field(default_factory=list)


def make_engine(task: MeasureTask) -> Any:
    """A vLLM engine in this process, so that its scheduler can be watched."""
    import pyramid_vllm  # noqa: F401, I001 (lets `LLM` take a KV policy)
    from vllm import LLM

    longest = max(map(len, task.prompts)) + task.output_tokens
    return LLM(
        model=task.model,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        block_size=task.block_size,
        kv_cache_memory_bytes=task.kv_bytes,
        max_model_len=longest,
        max_num_seqs=task.max_num_seqs,
        max_num_batched_tokens=task.max_num_batched_tokens,
        seed=task.seed,
        kv_policy=task.kv_policy,
    ).llm_engine


class Watch:
    """Follows a scheduler from step to step, stock or not."""

    def __init__(self, scheduler: Any) -> None:
        from pyramid_vllm.spec import group_page_bytes

        self._scheduler = scheduler
        self._page_bytes = group_page_bytes(scheduler.kv_cache_config)
        self._last_bytes: dict[str, int] = {}
        self._preemptions: dict[str, int] = {}
        self._running: list[int] = []

    def step(self) -> None:
        """Look at the scheduler between two steps."""
        scheduler = self._scheduler
        self._running.append(len(scheduler.running))
        for request in scheduler.requests.values():
            self._preemptions[request.request_id] = request.num_preemptions
            if request.num_computed_tokens > request.num_prompt_tokens:
                ids = scheduler.kv_cache_manager.get_block_ids(request.request_id)
                held = sum(map(len, ids)) * self._page_bytes
                self._last_bytes[request.request_id] = held

    def result(self) -> Measured:
        """The counts so far."""
        counters = getattr(self._scheduler, "kv_counters", None)
        held = self._last_bytes.values()
        return Measured(
            kv_bytes_per_request=sum(held) / max(1, len(held)),
            max_num_running=max(self._running, default=0),
            mean_num_running=sum(self._running) / max(1, len(self._running)),
            num_preemptions=sum(self._preemptions.values()),
            num_pages_freed=counters.num_pages_freed if counters else 0,
            num_compactions=counters.num_compactions if counters else 0,
        )


def run_batch(
    engine: Any, task: MeasureTask, progress: Callable[[int], None]
) -> Measured:
    """Run all prompts at once, greedily.

    Args:
        engine: from ``make_engine``.
        task: the prompts and their output length.
        progress: told the finished requests after every step.
    """
    from vllm import SamplingParams

    watch = Watch(engine.engine_core.engine_core.scheduler)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=task.output_tokens, ignore_eos=True
    )
    for index, prompt in enumerate(task.prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    outputs: dict[str, list[int]] = {}
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = list(output.outputs[0].token_ids)
        watch.step()
        progress(len(outputs))
    seconds = time.perf_counter() - start
    result = watch.result()
    result.outputs = [outputs[str(index)] for index in range(len(task.prompts))]
    tokens = sum(map(len, task.prompts)) + sum(map(len, result.outputs))
    result.seconds = seconds
    result.total_tokens_per_s = tokens / seconds
    return result


def main() -> None:
    """Entry point of the child process."""
    task = MeasureTask(**json.load(sys.stdin))

    def report(kind: str, value: Any) -> None:
        print(f"{MARK}{json.dumps({kind: value})}", flush=True)

    engine = make_engine(task)
    report("ready", True)
    measured = run_batch(engine, task, lambda done: report("done", done))
    report("result", asdict(measured))
    sys.stdout.flush()
    # vLLM's in-process engine leaves threads behind; nothing is left to save.
    os._exit(0)


if __name__ == "__main__":
    main()
