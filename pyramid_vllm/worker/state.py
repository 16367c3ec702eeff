"""What the tiered layers of one worker share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyramid_vllm.worker.counters import WorkerCounters
from pyramid_vllm.worker.queries import AccumulatedScores, QueryWindows
from pyramid_vllm.worker.timing import CompactionTimer

if TYPE_CHECKING:
    from pyramid_vllm.plan import StepPlan
    from pyramid_vllm.policy import PolicyConfig
    from pyramid_vllm.worker.prune import RowPruner
    from pyramid_vllm.worker.record import KeptRecord
    from pyramid_vllm.worker.scales import KeyScales
    from pyramid_vllm.worker.step import TierStep


@dataclass
class WorkerState:
    """Built once the worker knows its layers; read by each of them."""

    step: TierStep
    policies: Mapping[str, PolicyConfig]
    """By the names that plans use."""
    counters: WorkerCounters
    max_scores: int
    """Most tokens, of all requests, that are scored at once in each layer."""
    pruner: RowPruner | None
    """None: the policy prunes nothing."""
    timer: CompactionTimer
    queries: QueryWindows = field(default_factory=QueryWindows)
    accumulated: AccumulatedScores = field(default_factory=AccumulatedScores)
    key_scales: list[KeyScales] = field(default_factory=list)
    """Of every cache group."""
    record: KeptRecord | None = None
    """Which tokens are held; None: not recorded."""

    def begin(self, plan: StepPlan) -> None:
        """Start a step: requests that left are forgotten."""
        self.queries.release(plan.released)
        self.accumulated.release(plan.released)
        if self.step.generated is not None:
            self.step.generated.release(plan.released)
        if plan.windows or plan.generated:
            for scales in self.key_scales:
                scales.refresh()
        self.step.begin(plan)
        self.counters.num_scheduled += plan.num_prompt_tokens

    def pruning(self, plan: StepPlan) -> AbstractContextManager[None]:
        """The pruner's hooks, where the step prunes."""
        if not plan.prunes:
            return nullcontext()
        assert self.pruner is not None
        self.counters.num_pruned_steps += 1
        return self.pruner.pruning(self.step)

    def finish(self, plan: StepPlan, num_layers: int) -> None:
        """End a step.

        Raises:
            RuntimeError: a layer did not do its part.
        """
        if self.step.generated is not None:
            self.step.generated.end_step()
        self.step.finish(num_layers)
        through = [w.req_id for w in plan.windows if not w.retain]
        self.queries.release(through)
        self.accumulated.release(through)
