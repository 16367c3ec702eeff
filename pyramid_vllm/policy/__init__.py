"""Token counts: how many of a request's tokens each layer keeps."""

from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.errors import KVPolicyError
from pyramid_vllm.policy.layouts import tier_layout
from pyramid_vllm.policy.lengths import LengthRule
from pyramid_vllm.policy.memory import MemoryModel, num_pages
from pyramid_vllm.policy.presets import (
    NONE,
    preset_dir,
    preset_names,
    resolve_policy,
)
from pyramid_vllm.policy.profiles import fitted, profile_weights
from pyramid_vllm.policy.requests import (
    POLICY_ARG,
    RETENTION_ARG,
    RequestPolicies,
    asks_for_policy,
)
from pyramid_vllm.policy.scorers import SCORERS, Queries, Scorer, scorer
from pyramid_vllm.policy.tiers import TierLayout

__all__ = [
    "NONE",
    "POLICY_ARG",
    "RETENTION_ARG",
    "SCORERS",
    "KVPolicyError",
    "LengthRule",
    "MemoryModel",
    "PolicyConfig",
    "Queries",
    "RequestPolicies",
    "Scorer",
    "TierLayout",
    "asks_for_policy",
    "fitted",
    "num_pages",
    "preset_dir",
    "preset_names",
    "profile_weights",
    "resolve_policy",
    "scorer",
    "tier_layout",
]
