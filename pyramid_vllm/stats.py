"""A policy's counters: made by the scheduler, shown by the front end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Attribute of ``ModelRunnerOutput``: seconds of a worker's compactions.
TIMES_ATTRIBUTE = "kv_policy_compaction_times"
#: Key of the policy's stats in those that vLLM sends from the scheduler to loggers.
STATS_KEY = "kv_policy"

#: Reasons why requests are served unpruned.
PROMPT_LOGPROBS = "prompt_logprobs"
SHORT_PROMPT = "short_prompt"
KEEPS_ALL = "keeps_all"
#: What the prefix cache did not have of the prompt is too short to evict.
CACHED_PREFIX = "cached_prefix"


@dataclass
class PolicyCounters:
    """Counters of a policy since start-up, or since an earlier copy.

    A KV entry is the key and value of one token in one layer.
    """

    evicted_tokens: dict[str, int] = field(default_factory=dict)
    """KV entries evicted or pruned, by tier."""
    pages_freed: dict[str, int] = field(default_factory=dict)
    """Pages that evictions returned to the block pool, by tier, less the pages that
    prompts took to gather tokens of shared pages."""
    requests: dict[str, int] = field(default_factory=dict)
    """Accepted requests, by the name of their policy."""
    unpruned: dict[str, int] = field(default_factory=dict)
    """Requests whose prompt is computed whole although the policy prunes, or whose
    prompt is not evicted; by reason."""
    num_compactions: int = 0
    """Compactions of requests."""
    num_groups: int = 0
    """Compactions of generated tokens: compressed groups."""
    num_segments: int = 0
    """Segments that were compressed, or found compressed."""
    num_shared_segments: int = 0
    """Of these: segments found compressed in the prefix cache when they were due."""
    num_segment_hits: int = 0
    """Compressed segments that admitted requests got from the prefix cache."""
    num_waits: int = 0
    """Requests that waited for another to compute their prefix, in steps."""
    rows_scheduled: int = 0
    """Scheduled prompt tokens, times layers."""
    rows_computed: int = 0
    """Scheduled rows that layers computed."""
    max_num_running: int = 0
    """Maximum number of concurrent sequences."""
    num_refused_requests: int = 0
    """Requests that ended with an error because they cannot be served."""
    num_capped_outputs: int = 0
    """Requests whose output is capped at what the whole pool can hold."""

    @property
    def num_evicted_tokens(self) -> int:
        """Evicted KV entries of all tiers."""
        return sum(self.evicted_tokens.values())

    @property
    def num_pages_freed(self) -> int:
        """Freed pages of all tiers."""
        return sum(self.pages_freed.values())

    def since(self, before: PolicyCounters) -> PolicyCounters:
        """The difference from an earlier copy of the same engine's counters."""
        return self._combined(before, -1)

    def plus(self, other: PolicyCounters) -> PolicyCounters:
        """The sum of both counters."""
        return self._combined(other, 1)

    def copy(self) -> PolicyCounters:
        """A copy of the counters."""
        # Runs in every step: `asdict` makes deep copies, which is slower.
        values: dict[str, Any] = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(self).items()
        }
        return PolicyCounters(**values)

    def _combined(self, other: PolicyCounters, sign: int) -> PolicyCounters:
        result = self.copy()
        for name, theirs in vars(other).items():
            if isinstance(theirs, int):
                setattr(result, name, getattr(result, name) + sign * theirs)
                continue
            ours = getattr(result, name)
            for key, count in theirs.items():
                ours[key] = ours.get(key, 0) + sign * count
        return result


def add(counts: dict[str, int], key: str, count: int = 1) -> None:
    """Add ``count`` to a counter."""
    counts[key] = counts.get(key, 0) + count


@dataclass(frozen=True)
class PolicyStats:
    """The stats that an engine sends to its front end after a step."""

    counters: PolicyCounters
    """Counts since the last stats."""
    tokens_held: int
    """KV entries of running requests in the cache."""
    tokens_represented: int
    """KV entries that the uncompressed cache would hold instead."""
    num_above_stock: int
    """Running sequences that would not fit into the uncompressed cache."""
    compaction_times: tuple[float, ...]
    """Seconds of each finished step that compacted."""

    def payload(self) -> dict[str, Any]:
        """Plain values to send to another process; the counts are not copied."""
        return {STATS_KEY: {**vars(self), "counters": vars(self.counters)}}

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> PolicyStats:
        """The stats of a payload."""
        values = dict(payload[STATS_KEY])
        values["counters"] = PolicyCounters(**values["counters"])
        values["compaction_times"] = tuple(values["compaction_times"])
        return cls(**values)
