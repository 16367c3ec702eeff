"""The plan of a step, which the scheduler sends to the workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Attribute of vLLM's ``SchedulerOutput`` that carries the plan.
PLAN_ATTRIBUTE = "kv_policy_plan"


@dataclass(frozen=True, slots=True)
class PromptWindow:
    """A prompt with work for the policy in this step.

    Set by the scheduler; read by every tiered attention layer.
    """

    req_id: str
    policy: str
    """Name of the request's policy."""
    num_tokens: int
    """Prompt tokens computed after this step."""
    num_queries: int
    """Number of newest tokens whose queries score, now or in a later step."""
    retain: bool
    """Whether a later step of the prompt needs these queries or their scores."""
    num_kept: tuple[int, ...] | None
    """Cache length of each tier after this step's compaction; None: no compaction."""
    num_recent: int
    """Number of newest tokens that are always kept."""
    num_shared: int = 0
    """Number of first tokens that came from the prefix cache: they stay where they are,
    and only the others are scored and evicted."""
    num_rows: tuple[int, ...] | None = None
    """Rows that each tier computes; None: all tiers compute all scheduled rows."""
    pages: tuple[tuple[int, ...] | None, ...] | None = None
    """For each KV cache group the pages of the kept tokens after the first
    ``num_shared``, in order; None: they are the request's first pages after those."""
    is_ordered: bool = True
    """Whether tokens can be moved one after the other, oldest first: no page of
    ``pages`` holds tokens that are read after it is written."""

    def first_replaced(self, tier: int) -> int:
        """First cached token in the pages that ``pages`` replaces."""
        return self.num_shared


@dataclass(frozen=True, slots=True)
class GeneratedWindow:
    """A request some of whose tokens this step compresses: a group of generated tokens,
    or a segment.

    Set by the scheduler; read by the worker after the step's forward pass.
    """

    req_id: str
    policy: str
    """Name of the request's policy."""
    num_tokens: int
    """Tokens computed after this step."""
    num_queries: int
    """Number of newest tokens whose queries score the window."""
    starts: tuple[int, ...]
    """First cached token of the window, per tier."""
    size: int
    """Number of tokens in the window."""
    num_chosen: tuple[int, ...]
    """Number of them that each tier keeps."""
    num_kept: tuple[int, ...]
    """Cache length of each tier after the compaction."""
    num_first: int = 0
    """First tokens of the window that are kept whatever their score."""
    pages: tuple[tuple[int, ...] | None, ...] | None = None
    """For each KV cache group the request's pages from the window's first on: those of
    the kept tokens, then those of newer ones, which stay where they are. None: a group
    that keeps the whole window; of all groups: kept and newer tokens move forward in
    the request's own pages."""
    is_found: bool = False
    """Whether ``pages`` come from the prefix cache: nothing is scored or moved."""
    is_ordered: bool = True
    """As of a ``PromptWindow``."""

    def first_replaced(self, tier: int) -> int:
        """First cached token in the pages that ``pages`` replaces."""
        return self.starts[tier]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The counts that workers need for one step; it has no scores and no tokens."""

    num_reqs: int
    """Scheduled requests. Read by the worker, which checks that the step ran."""
    num_prompt_tokens: int
    """Prompt tokens that this step computes. Read by the worker's counters."""
    windows: tuple[PromptWindow, ...]
    """Read by the attention layers (scores, pruning, compaction) and, after the step,
    by the worker (block-table rows)."""
    generated: tuple[GeneratedWindow, ...]
    """Read by the worker after the forward pass (scores, compaction, rows)."""
    released: frozenset[str]
    """Requests that finished or were preempted: the worker drops what it holds of
    them, queries and counts of evicted tokens."""
    begun: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Evicted tokens, by tier, of requests that this step begins with compressed
    segments of the prefix cache. Read by the worker."""

    @property
    def prunes(self) -> bool:
        """Whether any tier computes fewer rows than were scheduled."""
        return any(window.num_rows is not None for window in self.windows)

    @property
    def compactions(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """Of each request from which this step evicts tokens: its id, its tokens
        computed after the step, and its cache lengths per tier."""
        windows: list[PromptWindow | GeneratedWindow]
        windows = [*self.windows, *self.generated]
        return [
            (window.req_id, window.num_tokens, window.num_kept)
            for window in windows
            if window.num_kept is not None
        ]


def attach_plan(output: Any, plan: StepPlan) -> None:
    """Attach a plan to vLLM's ``SchedulerOutput``."""
    setattr(output, PLAN_ATTRIBUTE, plan)


def plan_of(output: Any) -> StepPlan | None:
    """The plan of a ``SchedulerOutput``; None: a step of vLLM itself."""
    found: StepPlan | None = getattr(output, PLAN_ATTRIBUTE, None)
    return found
