"""What the tiered layers of one worker share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pyramid_vllm.worker.queries import AccumulatedScores, QueryWindows

if TYPE_CHECKING:
    from pyramid_vllm.plan import StepPlan
    from pyramid_vllm.policy import PolicyConfig
    from pyramid_vllm.worker.prune import RowPruner
    from pyramid_vllm.worker.query_slots import QuerySlots
    from pyramid_vllm.worker.step import TierStep


class RowCounters:
    """Rows that prompts were scheduled with, and those that layers computed.

    Args:
        num_layers: tiered layers of this worker.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_scheduled = 0
        """Prompt tokens of all steps."""
        self.num_computed: npt.NDArray[np.int64] = np.zeros(num_layers, dtype=np.int64)
        """``[num_layers]``: of these, the rows that each layer's attention saw."""
        self.num_pruned_steps = 0
        """Steps in which deeper layers computed fewer rows."""

    def count(self, layer: int, tier: int, num_rows: int, step: TierStep) -> None:
        """Count one layer's rows of a step.

        Raises:
            RuntimeError: the layer computed other rows than the plan says.
        """
        expected = step.rows.total_rows[tier]
        if num_rows != expected:
            raise RuntimeError(
                f"KV policy: layer {layer} computed {num_rows} rows, its plan has "
                f"{expected}"
            )
        assert step.plan is not None
        num_decode = step.rows.total_scheduled - step.plan.num_prompt_tokens
        self.num_computed[layer] += num_rows - num_decode


@dataclass
class WorkerState:
    """Built once the worker knows its layers; read by each of them."""

    step: TierStep
    policies: Mapping[str, PolicyConfig]
    """By the names that plans use."""
    counters: RowCounters
    pruner: RowPruner | None
    """None: the policy prunes nothing."""
    group_queries: QuerySlots | None
    """None: generated tokens are not scored."""
    queries: QueryWindows = field(default_factory=QueryWindows)
    accumulated: AccumulatedScores = field(default_factory=AccumulatedScores)

    def begin(self, plan: StepPlan) -> None:
        """Start a step: what left is forgotten."""
        self.queries.release(plan.released)
        self.accumulated.release(plan.released)
        if self.group_queries is not None:
            self.group_queries.release(plan.released)
        self.step.begin(plan)
        self.counters.num_scheduled += plan.num_prompt_tokens

    def pruning(self, plan: StepPlan) -> AbstractContextManager[None]:
        """The pruner's hooks, where the step prunes."""
        if not plan.prunes:
            return nullcontext()
        assert self.pruner is not None
        self.counters.num_pruned_steps += 1
        return self.pruner.pruning()

    def finish(self, plan: StepPlan, num_layers: int) -> None:
        """End a step.

        Raises:
            RuntimeError: a layer did not do its part.
        """
        self.step.finish(num_layers)
        through = [w.req_id for w in plan.windows if not w.retain]
        self.queries.release(through)
        self.accumulated.release(through)
