"""The scheduler's counters of its policy, and their report to the front end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyramid_vllm.scheduler.lengths import needs_all_rows
from pyramid_vllm.stats import (
    CACHED_PREFIX,
    KEEPS_ALL,
    PROMPT_LOGPROBS,
    SHORT_PROMPT,
    PolicyCounters,
    PolicyStats,
    add,
)

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from pyramid_vllm.plan import StepPlan
    from pyramid_vllm.policy import LengthRule
    from pyramid_vllm.scheduler.lengths import TierLengths
    from pyramid_vllm.scheduler.report import KVReport


class Statistics:
    """Counts requests and steps; makes the stats for the front end.

    Args:
        lengths: cached tokens of requests.
        report: pages and bytes of the engine's groups.
    """

    def __init__(self, lengths: TierLengths, report: KVReport) -> None:
        self.counters = PolicyCounters()
        """Since start-up."""
        self._told = PolicyCounters()
        self._times: list[float] = []
        self._lengths, self._report = lengths, report
        layout = report.rule.layout
        self._num_layers, self._sizes = layout.num_layers, np.array(layout.sizes)

    def count_request(self, rule: LengthRule, request: Request) -> None:
        """Count a request that is accepted under ``rule``."""
        add(self.counters.requests, rule.config.name)
        if rule.prunes and needs_all_rows(request):
            add(self.counters.unpruned, PROMPT_LOGPROBS)
        num_tokens = request.num_prompt_tokens
        if min(rule.cache_lengths(num_tokens)) == num_tokens:
            is_short = num_tokens <= rule.config.min_context
            add(self.counters.unpruned, SHORT_PROMPT if is_short else KEEPS_ALL)

    def count_whole(self) -> None:
        """Count a prompt that is kept whole because the prefix cache had most of it."""
        add(self.counters.unpruned, CACHED_PREFIX)

    def count_segment(self, is_found: bool) -> None:
        """Count a segment that was compressed, or found compressed when it was due."""
        self.counters.num_segments += 1
        self.counters.num_shared_segments += is_found

    def count_segment_hits(self, num_segments: int) -> None:
        """Count compressed segments that a request begins with."""
        self.counters.num_segment_hits += num_segments

    def count_wait(self) -> None:
        """Count a step in which a request waits for another to compute its prefix."""
        self.counters.num_waits += 1

    def count_freed(self, pages: Sequence[int]) -> None:
        """Count a request's compaction, which freed ``pages`` by tier."""
        self.counters.num_compactions += 1
        for tier, count in enumerate(pages):
            add(self.counters.pages_freed, str(tier), count)

    def count_step(self, plan: StepPlan, num_running: int) -> None:
        """Count a step's rows and groups."""
        counters, sizes = self.counters, self._sizes
        counters.max_num_running = max(counters.max_num_running, num_running)
        counters.num_groups += sum(w.pages is None for w in plan.generated)
        if plan.windows or plan.generated:
            evicted = self._sizes * self._lengths.num_ever_evicted
            for tier, count in enumerate(evicted.tolist()):
                counters.evicted_tokens[str(tier)] = count
        scheduled = plan.num_prompt_tokens * self._num_layers
        # The first tier computes every row.
        pruned = sum(
            int(sizes @ (window.num_rows[0] - np.array(window.num_rows)))
            for window in plan.windows
            if window.num_rows is not None
        )
        counters.rows_scheduled += scheduled
        counters.rows_computed += scheduled - pruned

    def take_times(self, times: Iterable[float]) -> None:
        """Take the seconds of compactions that a worker reports."""
        self._times += times

    def payload(self, running: Sequence[Request]) -> dict[str, Any]:
        """Changes since the last payload, and the tokens of ``running`` requests."""
        computed = np.array([request.num_computed_tokens for request in running], int)
        evicted = int(self._sizes @ self._lengths.num_evicted)
        represented = int(computed.sum()) * self._num_layers
        num_stock = self._report.num_stock_sequences(computed)
        times, self._times = tuple(self._times), []
        news, self._told = self.counters.since(self._told), self.counters.copy()
        stats = PolicyStats(
            counters=news,
            tokens_held=represented - evicted,
            tokens_represented=represented,
            num_above_stock=len(running) - num_stock,
            compaction_times=times,
        )
        return stats.payload()
