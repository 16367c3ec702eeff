"""KV cache specs of a model's layers, by tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from pyramid_vllm.policy import KVPolicyError, PolicyConfig
from pyramid_vllm.spec import TierAttentionSpec, length_rule

if TYPE_CHECKING:
    pass


def tiers_by_name(
    names: Sequence[str], policy: PolicyConfig, num_layers: int
) -> dict[str, int]:
    """The tier of each full-attention layer, first to last.

    Args:
        names: names of the runner's full-attention layers.
        policy: the engine's policy.
        num_layers: full-attention layers in the model's configuration.

    Raises:
        KVPolicyError: the runner has another number of layers.
    """
    if len(names) != num_layers:
        raise KVPolicyError(
            f"kv_policy does not support this model: {len(names)} of its layers "
            f"have full attention, its configuration says {num_layers}"
        )
    tiers = length_rule(policy, num_layers).layout.tier_of_layer
    return dict(zip(sorted(names, key=extract_layer_index), tiers, strict=True))


def tiered_specs(
    specs: dict[str, KVCacheSpec], policy: PolicyConfig, num_layers: int
) -> dict[str, KVCacheSpec]:
    """Specs by layer, with full-attention layers in tiers.

    Args:
        specs: the runner's specs, by layer name.
        policy: the engine's policy.
        num_layers: full-attention layers in the model's configuration.

    Raises:
        KVPolicyError: the runner has another number of layers.
    """
    names = [name for name, spec in specs.items() if type(spec) is FullAttentionSpec]
    tiered = {
        name: TierAttentionSpec.of(specs[name], tier, num_layers)
        for name, tier in tiers_by_name(names, policy, num_layers).items()
    }
    return specs | tiered
