"""The policy's line in vLLM's periodic log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from pyramid_vllm.stats import PolicyCounters, PolicyStats

logger = init_logger(f"vllm.{__name__}")


class PolicyLogging:
    """Adds up engines' stats between two lines, in place of a connector's logging.

    Args:
        name: the policy's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.reset()

    def reset(self) -> None:
        """Start the next line."""
        self._counters = PolicyCounters()
        self._held = self._represented = self._num_above_stock = 0
        self._times: list[float] = []

    def observe(self, transfer_stats_data: dict[str, Any]) -> None:
        """Add an engine's stats."""
        stats = PolicyStats.of(transfer_stats_data)
        self._counters = self._counters.plus(stats.counters)
        self._held += stats.tokens_held
        self._represented += stats.tokens_represented
        self._num_above_stock = max(self._num_above_stock, stats.num_above_stock)
        self._times += stats.compaction_times

    def log(self, log_fn: Callable[..., None] = logger.info) -> None:
        """Write the line, if any step ran since the last one."""
        if not self._represented:
            return
        counters = self._counters
        parts = [
            f"held {self._held / self._represented:.1%} of the tokens of running "
            "requests",
            f"{counters.num_compactions} compactions",
            f"{counters.num_pages_freed} pages freed",
            f"{counters.num_evicted_tokens} KV entries evicted",
        ]
        if self._times:
            mean = sum(self._times) / len(self._times)
            parts.append(f"{mean * 1e3:.1f} ms per compacting step")
        if counters.rows_computed < counters.rows_scheduled:
            share = counters.rows_computed / counters.rows_scheduled
            parts.append(f"{share:.1%} of the prompts' rows computed")
        if self._num_above_stock:
            parts.append(
                f"up to {self._num_above_stock} requests more than the uncompressed "
                "cache holds"
            )
        log_fn("KV policy %s: %s", self._name, ", ".join(parts))
        self.reset()
