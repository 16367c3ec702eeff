"""Counts of what a policy did to a batch, read from its scheduler."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

_COUNTS = ("num_compactions", "num_pages_freed", "num_evicted_tokens")


@dataclass(frozen=True)
class Activity:
    """Counts and means of one batch."""

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
        self._prompts: dict[str, tuple[float, int]] = {}
        """Prompt tokens that a layer kept, and all prompt tokens, by request."""
        self._before = self._counts()

    def step(self) -> None:
        """Look at the scheduler between two steps."""
        for name, request in self._scheduler.requests.items():
            length = request.num_prompt_tokens
            if request.num_computed_tokens < length:
                continue
            ids = self._scheduler.kv_cache_manager.get_block_ids(name)
            self._bytes[name] = sum(map(len, ids)) * self._page_bytes
            if name not in self._prompts:
                lengths, evicted = getattr(self._scheduler, "tier_lengths", None), 0.0
                if lengths is not None:
                    layout = self._scheduler.kv_rule.layout
                    evicted = float(layout.mean(lengths.evicted(name)))
                self._prompts[name] = (length - evicted, length)

    def _counts(self) -> dict[str, int]:
        counters = getattr(self._scheduler, "kv_counters", None)
        return {name: getattr(counters, name, 0) for name in _COUNTS}

    def result(self) -> Activity:
        """What happened since the watch began."""
        now = self._counts()
        kept, prompts = zip(*self._prompts.values(), strict=True)
        return Activity(
            **{name: now[name] - self._before[name] for name in _COUNTS},
            kv_bytes_per_request=fmean(self._bytes.values()),
            kept_tokens=fmean(kept),
            prompt_tokens=fmean(prompts),
        )
