"""The one object that crosses from the scheduler to the workers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Attribute of ``SchedulerOutput`` that carries the plan.
PLAN_ATTRIBUTE = "kv_policy_plan"


@dataclass(frozen=True, slots=True)
class PromptWindow:
    """A request in its prompt whose newest queries matter in this step.

    Set by the scheduler; read by every tiered attention layer.
    """

    req_id: str
    num_tokens: int
    """Prompt tokens computed once this step is over."""
    num_queries: int
    """Newest of them whose queries score, or will score in a later step."""
    retain: bool
    """Whether a later step of the same prompt needs these queries."""
    num_kept: tuple[int, ...] | None
    """Cache length of each tier after this step's compaction; None: no compaction."""
    num_recent: int
    """Newest tokens that the compaction always keeps."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that workers need to know of one step. Numbers only; no scores, no tokens."""

    req_ids: tuple[str, ...]
    """The scheduled requests. Read by the worker to map them to its batch rows."""
    num_evicted: npt.NDArray[np.int32]
    """``[len(req_ids), num_tiers]``: computed tokens minus cache length, before this
    step. Read by the metadata builders: lengths and slots follow from it."""
    windows: tuple[PromptWindow, ...]
    """Read by the attention layers (scores, compaction) and, after the step, by the
    worker (block-table rows)."""
    released: frozenset[str]
    """Requests that finished or were preempted: the worker drops their queries."""

    @property
    def has_evicted(self) -> bool:
        """Whether any scheduled request has evicted tokens."""
        return bool(self.num_evicted.any())

    @property
    def num_compactions(self) -> int:
        """Requests that this step compacts."""
        return sum(window.num_kept is not None for window in self.windows)
