"""What a policy has done: counted by the scheduler, shown by the front end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Attribute of ``ModelRunnerOutput`` with the seconds of a worker's compactions.
TIMES_ATTRIBUTE = "kv_policy_compaction_times"
#: Key of the stats among those that vLLM carries from the scheduler to its loggers.
STATS_KEY = "kv_policy"

#: Why requests are served unpruned.
PROMPT_LOGPROBS = "prompt_logprobs"
SHORT_PROMPT = "short_prompt"
KEEPS_ALL = "keeps_all"


@dataclass
class PolicyCounters:
    """What the policy has done since start-up, or since another such count.

    A KV entry is the key and value of one token in one layer.
    """

    evicted_tokens: dict[str, int] = field(default_factory=dict)
    """KV entries evicted or pruned, by tier."""
    pages_freed: dict[str, int] = field(default_factory=dict)
    """Pages that evictions gave back to the block pool, by tier; less those that a
    prompt took to leave shared ones."""
    requests: dict[str, int] = field(default_factory=dict)
    """Requests taken on, by the name of their policy."""
    unpruned: dict[str, int] = field(default_factory=dict)
    """Of these, by reason: those of whose prompts every row is computed though the
    policy prunes, and those of whose prompts nothing is evicted."""
    num_compactions: int = 0
    """Times that a request was compacted."""
    num_groups: int = 0
    """Of these: groups of generated tokens that were compressed."""
    rows_scheduled: int = 0
    """Prompt tokens that steps were scheduled with, times layers."""
    rows_computed: int = 0
    """Of these, the rows that layers computed."""
    max_num_running: int = 0
    """Most sequences running at once."""
    num_refused_requests: int = 0
    """Requests that could not be served, and ended with an error."""
    num_capped_outputs: int = 0
    """Requests that may end where the whole pool does, before their own limit."""

    @property
    def num_evicted_tokens(self) -> int:
        """Of all tiers."""
        return sum(self.evicted_tokens.values())

    @property
    def num_pages_freed(self) -> int:
        """Of all tiers."""
        return sum(self.pages_freed.values())

    def since(self, before: PolicyCounters) -> PolicyCounters:
        """What came in addition to an earlier count of the same engine."""
        return self._combined(before, -1)

    def plus(self, other: PolicyCounters) -> PolicyCounters:
        """Both counts together."""
        return self._combined(other, 1)

    def copy(self) -> PolicyCounters:
        """A count that does not change."""
        # In every step: `asdict` copies each count deeply, and more slowly.
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
    """Count something under a name."""
    counts[key] = counts.get(key, 0) + count


@dataclass(frozen=True)
class PolicyStats:
    """What one engine tells its front end after a step."""

    counters: PolicyCounters
    """Counted since the last ones."""
    tokens_held: int
    """KV entries of running requests in the cache."""
    tokens_represented: int
    """KV entries that the uncompressed cache would hold of them."""
    num_above_stock: int
    """Running sequences that the uncompressed cache would have had no room for."""
    compaction_times: tuple[float, ...]
    """Seconds, of each step that compacted and is over."""

    def payload(self) -> dict[str, Any]:
        """Plain values, as they cross to another process; the counts are not copied."""
        return {STATS_KEY: {**vars(self), "counters": vars(self.counters)}}

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> PolicyStats:
        """The stats of a payload."""
        values = dict(payload[STATS_KEY])
        values["counters"] = PolicyCounters(**values["counters"])
        values["compaction_times"] = tuple(values["compaction_times"])
        return cls(**values)
