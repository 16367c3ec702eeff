"""Counts of what one side did, read from its scheduler and worker at each step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Watch:
    """Follows a scheduler and its worker from step to step, stock or not."""

    def __init__(self, core: Any) -> None:
        from pyramid_vllm.spec import group_page_bytes

        self._core, self._scheduler = core, core.scheduler
        self._page_bytes = group_page_bytes(core.scheduler.kv_cache_config)
        self._last_bytes: dict[str, int] = {}
        self._preemptions: dict[str, int] = {}
        self._running: list[int] = []
        self._num_scheduled = self._num_prompt_tokens = 0
        self._before = self._counts()

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
        self._running.append(len(self._scheduler.running))
        for name, request in self._scheduler.requests.items():
            self._preemptions[name] = request.num_preemptions
            if request.num_computed_tokens > request.num_prompt_tokens:
                ids = self._scheduler.kv_cache_manager.get_block_ids(name)
                self._last_bytes[name] = sum(map(len, ids)) * self._page_bytes

    def _counts(self) -> tuple[int, int, float]:
        """Compactions, freed pages and pruned rows a layer, since start-up."""
        counters = getattr(self._scheduler, "kv_counters", None)
        if counters is None:
            return 0, 0, 0.0
        rows = self._core.model_executor.driver_worker.worker.tier_state.counters
        pruned = rows.num_scheduled - float(rows.num_computed.mean())
        return counters.num_compactions, counters.num_pages_freed, pruned

    def counts(self) -> dict[str, Any]:
        """The counts so far, as ``Measured`` has them."""
        counts = zip(self._counts(), self._before, strict=True)
        compactions, freed, pruned = (now - before for now, before in counts)
        held = self._last_bytes.values()
        return {
            "kv_bytes_per_request": sum(held) / max(1, len(held)),
            "max_num_running": max(self._running, default=0),
            "mean_num_running": sum(self._running) / max(1, len(self._running)),
            "num_preemptions": sum(self._preemptions.values()),
            "num_pages_freed": int(freed),
            "num_compactions": int(compactions),
            "num_rows_scheduled": self._num_scheduled,
            "num_rows_computed": self._num_scheduled - pruned,
            "num_prompt_tokens_computed": self._num_prompt_tokens,
        }
