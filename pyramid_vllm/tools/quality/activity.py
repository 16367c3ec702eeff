"""What a policy did to the requests of a batch, seen from the scheduler."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Activity:
    """Of one batch."""

    num_compactions: int
    num_pages_freed: int
    num_evicted_tokens: int
    """Evicted and pruned tokens, summed over layers."""
    kv_bytes_per_request: float
    """Mean over requests of the KV bytes held in their last step."""
    kept_tokens: float
    """Prompt tokens that a layer kept; mean over layers, then over requests."""
    prompt_tokens: float
    """Mean over requests."""


class ActivityWatch:
    """Follows a scheduler from step to step, stock or not."""

    def __init__(self, scheduler: Any) -> None:
        from pyramid_vllm.spec import group_page_bytes

        self._scheduler = scheduler
        self._page_bytes = group_page_bytes(scheduler.kv_cache_config)
        self._bytes: dict[str, int] = {}
        self._kept: dict[str, float] = {}
        self._prompts: dict[str, int] = {}
        self._before = self._counts()

    def step(self) -> None:
        """Look at the scheduler between two steps."""
        for request in self._scheduler.requests.values():
            if request.num_computed_tokens < request.num_prompt_tokens:
                continue
            name = request.request_id
            ids = self._scheduler.kv_cache_manager.get_block_ids(name)
            self._bytes[name] = sum(map(len, ids)) * self._page_bytes
            if name not in self._kept:
                self._kept[name] = request.num_prompt_tokens - self._mean_evicted(name)
                self._prompts[name] = request.num_prompt_tokens

    def _mean_evicted(self, req_id: str) -> float:
        lengths = getattr(self._scheduler, "tier_lengths", None)
        if lengths is None:
            return 0.0
        layout = self._scheduler.kv_rule.layout
        return float(layout.mean(lengths.evicted(req_id)))

    def _counts(self) -> tuple[int, int, int]:
        counters = getattr(self._scheduler, "kv_counters", None)
        if counters is None:
            return 0, 0, 0
        return (
            counters.num_compactions,
            counters.num_pages_freed,
            counters.num_evicted_tokens,
        )

    def result(self) -> Activity:
        """What happened since the watch began."""
        now, before = self._counts(), self._before
        return Activity(
            num_compactions=now[0] - before[0],
            num_pages_freed=now[1] - before[1],
            num_evicted_tokens=now[2] - before[2],
            kv_bytes_per_request=_mean(self._bytes),
            kept_tokens=_mean(self._kept),
            prompt_tokens=_mean(self._prompts),
        )


def _mean(values: dict[str, Any]) -> float:
    return float(sum(values.values()) / max(1, len(values)))
