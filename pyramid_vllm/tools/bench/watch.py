"""Counts of what one side did, read from its scheduler and worker at each step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pyramid_vllm.stats import CACHED_PREFIX
from pyramid_vllm.tools.quality.activity import ActivityWatch


@dataclass(frozen=True)
class Measured:
    """Counts and times of one side."""

    kv_bytes_per_request: float
    """Mean over requests of the KV bytes held in their last step; pages that requests
    share count for each of them."""
    max_num_running: int
    mean_num_running: float
    num_preemptions: int
    num_pages_freed: int
    num_compactions: int
    num_kept_whole: int
    """Prompts that were kept whole because they share most of what they hold."""
    num_rows_scheduled: int
    """Rows of the first layer: what stock vLLM would have computed in every layer."""
    num_rows_computed: float
    """Rows that layers computed, mean over layers."""
    num_prompt_tokens_computed: int
    """Prompt tokens of the first layer, also those that preemption computes again."""
    seconds: float
    total_tokens_per_s: float
    prefix_caching: bool
    """Whether the engine looked for prompts in its prefix cache."""
    prefix_hit_rate: float
    """Prompt tokens that were found there, of all prompt tokens."""
    first_token_s: list[float]
    """Seconds from when each request was sent to its first token."""
    finish_s: list[float]
    """Seconds from when each request was sent to its last token."""
    outputs: list[list[int]]


class Watch(ActivityWatch):
    """Follows a scheduler and its worker from step to step, stock or not."""

    def __init__(self, core: Any) -> None:
        super().__init__(core.scheduler)
        self._core = core
        self._preemptions: dict[str, int] = {}
        self._running: list[int] = []
        self._num_scheduled = self._num_prompt_tokens = 0
        self._pruned_before = self._pruned_rows()
        self._whole_before = self._num_whole()

    @contextmanager
    def counting_rows(self) -> Iterator[None]:
        """Count what the scheduler gives to steps."""
        scheduler, schedule = self._scheduler, self._scheduler.schedule

        def counting(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._num_scheduled += output.total_num_scheduled_tokens
            for request_id, num_tokens in output.num_scheduled_tokens.items():
                request = scheduler.requests[request_id]
                # Tokens count as computed as soon as they are scheduled.
                start = request.num_computed_tokens - num_tokens
                left = request.num_prompt_tokens - start
                self._num_prompt_tokens += max(0, min(left, num_tokens))
            return output

        scheduler.schedule = counting
        try:
            yield
        finally:
            scheduler.schedule = schedule

    def step(self) -> None:
        """Look at the scheduler between two steps."""
        super().step()
        self._running.append(len(self._scheduler.running))
        for name, request in self._scheduler.requests.items():
            self._preemptions[name] = request.num_preemptions

    def _pruned_rows(self) -> float:
        """Of a layer, mean over layers, since start-up."""
        if not hasattr(self._scheduler, "kv_counters"):
            return 0.0
        rows = self._core.model_executor.driver_worker.worker.tier_state.counters
        return float(rows.num_scheduled - rows.num_computed.mean())

    def _num_whole(self) -> int:
        """Prompts since start-up."""
        if not hasattr(self._scheduler, "kv_counters"):
            return 0
        return int(self._scheduler.kv_counters.unpruned.get(CACHED_PREFIX, 0))

    def counts(self) -> dict[str, Any]:
        """The counts so far, as ``Measured`` has them."""
        activity = self.result()
        return {
            "kv_bytes_per_request": activity.kv_bytes_per_request,
            "max_num_running": max(self._running),
            "mean_num_running": fmean(self._running),
            "num_preemptions": sum(self._preemptions.values()),
            "num_pages_freed": activity.num_pages_freed,
            "num_compactions": activity.num_compactions,
            "num_kept_whole": self._num_whole() - self._whole_before,
            "num_rows_scheduled": self._num_scheduled,
            "num_rows_computed": self._num_scheduled
            - (self._pruned_rows() - self._pruned_before),
            "num_prompt_tokens_computed": self._num_prompt_tokens,
        }
