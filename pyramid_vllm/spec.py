"""The KV cache spec of a tiered layer, shared by scheduler and workers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    replace_as,
)

from pyramid_vllm.policy import (
    KVPolicyError,
    LengthRule,
    PolicyConfig,
    RequestPolicies,
    fitted,
    profile_weights,
    resolve_policy,
    tier_layout,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Keys of vLLM's ``additional_config`` that name the policy and its changes.
POLICY_KEY = "kv_policy"
OVERRIDES_KEY = "kv_policy_config"


def configured_policy(additional_config: Any) -> PolicyConfig | None:
    """The policy that vLLM's ``additional_config`` names, or None.

    Raises:
        KVPolicyError: the policy is unknown or a setting of it is not valid.
    """
    if not isinstance(additional_config, dict):
        return None
    return resolve_policy(
        additional_config.get(POLICY_KEY), additional_config.get(OVERRIDES_KEY)
    )


def model_weights(vllm_config: VllmConfig) -> tuple[float, ...] | None:
    """The measured layer weights of the engine's model, if it has a profile."""
    return profile_weights(vllm_config.model_config.hf_text_config)


def engine_policy(vllm_config: VllmConfig) -> PolicyConfig | None:
    """The configured policy as it is for the engine's model, or None."""
    policy = configured_policy(vllm_config.additional_config)
    return None if policy is None else fitted(policy, model_weights(vllm_config))


def required_policy(vllm_config: VllmConfig) -> PolicyConfig:
    """The engine's policy, where classes that exist only for one are in use.

    Raises:
        KVPolicyError: no policy is configured.
    """
    policy = engine_policy(vllm_config)
    if policy is None:
        raise KVPolicyError(
            "pyramid_vllm's scheduler and worker need additional_config"
            f"['{POLICY_KEY}']: it is not set"
        )
    return policy


@lru_cache(maxsize=16)
def length_rule(policy: PolicyConfig, num_layers: int) -> LengthRule:
    """The policy's counts for a model with ``num_layers`` full-attention layers."""
    return LengthRule(policy, tier_layout(policy, num_layers))


@lru_cache(maxsize=16)
def request_policies(
    policy: PolicyConfig, num_layers: int, weights: tuple[float, ...] | None
) -> RequestPolicies:
    """What requests of an engine with that policy may ask for."""
    return RequestPolicies(policy, num_layers, weights)


@dataclass(frozen=True, kw_only=True)
class TierAttentionSpec(FullAttentionSpec):
    """A full-attention layer that belongs to a tier. vLLM groups layers by it."""

    tier: int
    num_layers: int
    """Full-attention layers of the whole model."""

    @classmethod
    def of(cls, spec: FullAttentionSpec, tier: int, num_layers: int) -> Self:
        """The same layer's spec, in a tier."""
        return replace_as(spec, cls, tier=tier, num_layers=num_layers)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        # vLLM merges by listing the fields that it knows, and would reset `tier`.
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different tiers share no KV cache group")
        return specs[0]

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        # Else all tiers would fall into one group.
        return all(spec == self for spec in kv_cache_specs.values())

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of this tier at the worst point of a prompt of ``max_model_len``."""
        rule = length_rule(required_policy(vllm_config), self.num_layers)
        max_model_len = vllm_config.model_config.max_model_len
        lengths = rule.peak_lengths(
            max_model_len, max_model_len, max_chunk(vllm_config)
        )
        return cdiv(lengths[self.tier], self.block_size) * self.page_size_bytes


def group_page_bytes(kv_cache_config: KVCacheConfig) -> int:
    """Bytes of one page of the block pool: that of the largest group."""
    return max(
        group.kv_cache_spec.page_size_bytes * len(group.layer_names)
        for group in kv_cache_config.kv_cache_groups
    )


def max_chunk(vllm_config: VllmConfig) -> int:
    """Most prompt tokens that one step computes."""
    scheduler = vllm_config.scheduler_config
    if not scheduler.enable_chunked_prefill:
        return int(vllm_config.model_config.max_model_len)
    return int(scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens)
