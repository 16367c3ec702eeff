"""Memory of the policy's own buffers, counted before the KV cache is sized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pyramid_vllm.kernels.scratch import MAX_NORMALIZERS, WAITING_BYTES, room
from pyramid_vllm.limits import PromptLimits
from pyramid_vllm.policy import LengthRule, PolicyConfig, Queries, RequestPolicies
from pyramid_vllm.worker.generated import QueryShape

#: Of a float32 and of an int32.
_BYTES = 4


class OwnBuffer(NamedTuple):
    """Buffers of one use."""

    num_bytes: int
    use: str
    """What lies in them, and the settings that decide how much."""

    def __str__(self) -> str:
        return f"{self.num_bytes:,} for {self.use}"


@dataclass(frozen=True)
class PromptBuffers:
    """The most that prompts need at once.

    What kernels know of a launch, a few integers for each request and tier, is left
    out: it is below a thousandth of the rest.

    Args:
        policies: all that requests may have.
        limits: of the engine.
        layers: shape of the queries of one request in all layers.
        num_kv_heads: of a layer, on this worker.
        max_model_len: tokens of the longest prompt.
        max_chunk: most prompt tokens that one step computes.
        shares: whether pages may be shared.
    """

    policies: RequestPolicies
    limits: PromptLimits
    layers: QueryShape
    num_kv_heads: int
    max_model_len: int
    max_chunk: int
    shares: bool

    def held(self) -> int:
        """Bytes of queries, or of scores that add up, of prompts that are cut.

        They are held in every layer; the layer that runs has what it puts together
        and what it reads too.
        """
        largest = max(map(self._held_in_a_layer, self.policies.evicting))
        return (self.layers.num_layers + 2) * self.limits.max_at_once * largest

    def _held_in_a_layer(self, config: PolicyConfig) -> int:
        if config.scored_queries is Queries.ALL:
            return self.num_kv_heads * self.max_model_len * _BYTES
        shape = self.layers._replace(
            num_layers=1, num_queries=self._num_queries(config)
        )
        return shape.num_bytes

    def _num_queries(self, config: PolicyConfig) -> int:
        """Most queries of a prompt that score in one step."""
        if config.scored_queries is Queries.ALL:
            return min(self.max_chunk, self.max_model_len)
        rule = LengthRule(config, self.policies.layout)
        return rule.num_queries(self.max_model_len)

    def scores(self) -> int:
        """Bytes of scores, of pooled ones and of the indices of what stays.

        Every cache group has scores of its own. The others are of one group at a time,
        and so are means over heads.
        """
        layout, num_scores = self.policies.layout, self.limits.max_scores
        by_head = room(layout.group_size * self.num_kv_heads * num_scores)
        means = 2 * layout.group_size * num_scores
        rows = room(num_scores)
        return ((sum(layout.groups_per_tier) + 2) * by_head + means + rows) * _BYTES

    def normalizers(self) -> int:
        """Bytes of what attention is divided by, in parts and as a whole."""
        configs = [c for c in self.policies.evicting if c.needs_queries]
        if not configs:
            return 0
        in_prompt = max(map(self._num_queries, configs))
        group = self.policies.layout.group_size
        generated = max(c.gen_queries if c.generation else 0 for c in configs)
        of_one = self.layers.num_heads * max(in_prompt, group * generated)
        return 2 * room(max(MAX_NORMALIZERS, of_one)) * _BYTES

    def gathered(self) -> int:
        """Bytes of keys and values that wait between two launches, of one layer or of
        as many as fit into a bound."""
        if not self.shares:
            return 0
        token = 2 * self.num_kv_heads * self.layers.head_size
        one = self.limits.max_scores * token * self.layers.dtype.itemsize
        return room(max(WAITING_BYTES, one))

    def all(self, settings: str) -> list[OwnBuffer]:
        """The buffers.

        Args:
            settings: of the engine, which decide how much is in flight.
        """
        return [
            OwnBuffer(
                self.held(),
                f"queries of {self.limits.max_at_once} prompts that are cut into "
                f"chunks ({settings})",
            ),
            OwnBuffer(
                self.scores(),
                f"scores of {self.limits.max_scores:,} tokens of prompts in one step "
                f"({settings})",
            ),
            OwnBuffer(
                self.gathered(),
                f"keys and values on their way to other pages ({settings})",
            ),
            OwnBuffer(self.normalizers(), "what attention is divided by"),
        ]
