"""What one worker has done of its plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pyramid_vllm.plan import StepPlan
    from pyramid_vllm.worker.step import TierStep


class WorkerCounters:
    """Counted where the work is done, for comparison with what was planned.

    Args:
        num_layers: tiered layers of this worker.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_plans = 0
        """Steps that ran by a plan."""
        self.num_compactions = 0
        """Times that a request was compacted."""
        self.num_pages_freed = 0
        """Pages that block tables have fewer since then, over all tiers."""
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

    def finish(self, plan: StepPlan, num_pages_freed: int) -> None:
        """Count a step that is over."""
        self.num_plans += 1
        self.num_compactions += len(plan.compactions)
        self.num_pages_freed += num_pages_freed

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for ``collective_rpc``."""
        return {
            "num_plans": self.num_plans,
            "num_compactions": self.num_compactions,
            "num_pages_freed": self.num_pages_freed,
            "num_pruned_steps": self.num_pruned_steps,
            "rows_scheduled": self.num_scheduled,
            "rows_computed": self.num_computed.tolist(),
        }
