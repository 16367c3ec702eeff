"""Policies of single requests on an engine that has a policy."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.errors import KVPolicyError
from pyramid_vllm.policy.layouts import tier_layout
from pyramid_vllm.policy.lengths import LengthRule
from pyramid_vllm.policy.presets import (
    NONE,
    preset_names,
    resolve_policy,
    with_retention,
)
from pyramid_vllm.policy.profiles import Weights, fitted
from pyramid_vllm.policy.tiers import TierLayout

#: Keys of ``SamplingParams.extra_args``, or of ``vllm_xargs`` over HTTP.
POLICY_ARG = "kv_policy"
RETENTION_ARG = "kv_retention"
#: Prompt lengths at which two policies are compared.
_SAMPLES = (1, 100, 1000, 4096)
#: A request's retention is rounded to one of so many, so that clients who ask for
#: ever new ones cannot have ever new rules made.
RETENTIONS = 1000
#: Cached rules: those of every retention, of the policies that clients use at once.
_MAX_RULES = 4 * RETENTIONS

#: Keeps every token: the policy of a request that asks for ``none``.
KEEP_ALL = PolicyConfig(name=NONE, retention=1.0, steepness=0.0, min_context=0)


def asks_for_policy(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request names a policy or a retention."""
    return any(key in (extra_args or ()) for key in (POLICY_ARG, RETENTION_ARG))


class RequestPolicies:
    """Resolves the policies of requests on the engine's tiers.

    Args:
        server: the engine's policy, for requests that name no policy.
        num_layers: the model's full-attention layers.
        weights: the model's measured layer weights, if it has a profile.
    """

    def __init__(
        self, server: PolicyConfig, num_layers: int, weights: Weights | None = None
    ) -> None:
        self.server = server
        self._weights = weights
        self.layout = tier_layout(server, num_layers)
        self.rule = LengthRule(server, self.layout)
        """The counts of the engine's policy."""
        self.valid = self._valid()
        """Policies that a request may ask for, by name."""
        self._rule: Callable[[Any, Any], LengthRule]
        self._rule = lru_cache(_MAX_RULES)(self._make_rule)

    @property
    def evicting(self) -> list[PolicyConfig]:
        """The valid policies that may evict tokens."""
        return [config for config in self.valid.values() if config is not KEEP_ALL]

    def rule_for(self, extra_args: Mapping[str, Any] | None) -> LengthRule:
        """The counts of a request.

        Args:
            extra_args: from the request's sampling parameters.

        Raises:
            KVPolicyError: names the argument, its value and what is valid.
        """
        if not asks_for_policy(extra_args):
            return self.rule
        assert extra_args is not None
        name = extra_args.get(POLICY_ARG, self.server.name)
        retention = extra_args.get(RETENTION_ARG)
        if not isinstance(name, str) or name not in self.valid:
            raise KVPolicyError(
                f"{POLICY_ARG} is {name!r}: valid on this server are "
                f"{', '.join(sorted(self.valid))}"
            )
        if retention is None:
            return self._rule(name, None)
        if (
            isinstance(retention, bool)
            or not isinstance(retention, int | float)
            or not 0 < retention <= 1
        ):
            raise KVPolicyError(
                f"{RETENTION_ARG} is {retention!r}: valid is a number above 0 and "
                "at most 1"
            )
        return self._rule(name, max(1, round(retention * RETENTIONS)) / RETENTIONS)

    def _make_rule(self, name: str, retention: float | None) -> LengthRule:
        config = self.valid[name]
        if retention is not None:
            if config is KEEP_ALL:
                raise KVPolicyError(
                    f"{RETENTION_ARG} is {retention}: {POLICY_ARG} '{NONE}' keeps all"
                )
            if config.capacity is not None:
                raise KVPolicyError(
                    f"{RETENTION_ARG} is {retention}: {POLICY_ARG} '{name}' keeps "
                    f"capacity={config.capacity} tokens, whatever the prompt's length"
                )
            config = with_retention(config, retention)
        rule = LengthRule(config, self.layout)
        rule.cache_lengths(1)  # not every budget can meet every retention
        return rule

    def _valid(self) -> dict[str, PolicyConfig]:
        valid = {NONE: KEEP_ALL}
        for name in preset_names():
            config = resolve_policy(name)
            if config is None:
                continue
            config = fitted(config, self._weights)
            if config.segments:
                config = config.with_page(self.server.page)
            if self._is_served(config):
                valid[name] = config
        return valid | {self.server.name: self.server}

    def _is_served(self, config: PolicyConfig) -> bool:
        """Whether the engine's tiers and buffers can serve a preset unchanged."""
        server, num_layers = self.server, self.layout.num_layers
        if config.segments != server.segments:
            return False
        if config.generation and config.needs_queries:
            held = server.gen_queries if server.generation else None
            if config.gen_queries != held:
                return False
        try:
            layout = tier_layout(config, num_layers)
            own, here = LengthRule(config, layout), LengthRule(config, self.layout)
            if own.prunes and not (self.rule.prunes and layout == self.layout):
                return False
            return all(
                _by_layer(own.cache_lengths(n), layout)
                == _by_layer(here.cache_lengths(n), self.layout)
                for n in _SAMPLES
            ) and _by_layer(own.group_kept, layout) == _by_layer(
                here.group_kept, self.layout
            )
        except KVPolicyError:
            return False  # the preset does not fit this model


def _by_layer(counts: tuple[int, ...], layout: TierLayout) -> list[int]:
    return [counts[tier] for tier in layout.tier_of_layer]
