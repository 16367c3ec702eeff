"""The KV cache spec of a tiered layer, and the engine's policy."""

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

#: Keys of vLLM's ``additional_config``: the policy, and settings that replace its.
POLICY_KEY = "kv_policy"
OVERRIDES_KEY = "kv_policy_config"


def configured_policy(additional_config: Any) -> PolicyConfig | None:
    """The policy in vLLM's ``additional_config``; None: no policy.

    Raises:
        KVPolicyError: the policy is unknown or one of its settings is not valid.
    """
    if not isinstance(additional_config, dict):
        return None
    return resolve_policy(
        additional_config.get(POLICY_KEY), additional_config.get(OVERRIDES_KEY)
    )


def model_weights(vllm_config: VllmConfig) -> tuple[float, ...] | None:
    """The measured layer weights of the engine's model; None: it has no profile."""
    return profile_weights(vllm_config.model_config.hf_text_config)


def engine_policy(vllm_config: VllmConfig) -> PolicyConfig | None:
    """The configured policy, fitted to the engine's model; None: no policy."""
    policy = configured_policy(vllm_config.additional_config)
    if policy is None:
        return None
    policy = fitted(policy, model_weights(vllm_config))
    page = vllm_config.cache_config.block_size
    return policy.with_page(page) if policy.segments else policy


def required_policy(vllm_config: VllmConfig) -> PolicyConfig:
    """The engine's policy, for classes that need one.

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
    """The policies that requests of an engine may ask for."""
    return RequestPolicies(policy, num_layers, weights)


@dataclass(frozen=True, kw_only=True)
class TierAttentionSpec(FullAttentionSpec):
    """The spec of a full-attention layer in a tier. vLLM groups layers by spec."""

    tier: int
    num_layers: int
    """Full-attention layers of the whole model."""

    @classmethod
    def of(cls, spec: FullAttentionSpec, tier: int, num_layers: int) -> Self:
        """A layer's spec, in a tier."""
        return replace_as(spec, cls, tier=tier, num_layers=num_layers)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        # vLLM merges only the fields that it knows, and would reset `tier`.
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different tiers share no KV cache group")
        return specs[0]

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        # Otherwise all tiers would be in one group.
        return all(spec == self for spec in kv_cache_specs.values())

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Peak bytes of a layer of this tier, for a prompt of ``max_model_len``."""
        rule = length_rule(required_policy(vllm_config), self.num_layers)
        max_model_len = vllm_config.model_config.max_model_len
        lengths = rule.peak_lengths(
            max_model_len, max_model_len, max_chunk(vllm_config)
        )
        return cdiv(lengths[self.tier], self.block_size) * self.page_size_bytes


def group_page_bytes(kv_cache_config: KVCacheConfig) -> int:
    """Bytes of a page of the block pool: a page of the largest group."""
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
