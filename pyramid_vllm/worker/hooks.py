"""Where the policy meets a step of vLLM's runner: metadata by group, layers' parts.

By vLLM's own hooks where it has them, else by what ``pyramid_vllm.attention`` puts in
the places of its backends' classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from pyramid_vllm.attention.tiered import TieredBuilder, TierLayer, run_layer
from pyramid_vllm.native import uses_native_hooks
from pyramid_vllm.spec import engine_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from pyramid_vllm.worker.adapter import RunnerAdapter
    from pyramid_vllm.worker.step import TierStep
    from pyramid_vllm.worker.v2 import V2Runner


def follow_attention(layer: Any, part: TierLayer) -> None:
    """Let a layer's part follow its attention.

    Args:
        layer: vLLM's attention layer.
        part: what it does for the policy.
    """
    if not uses_native_hooks():
        layer.impl.tier_layer = part
        return

    def hook(_layer: Any, query: torch.Tensor, attn_metadata: Any) -> None:
        run_layer(part, query, attn_metadata)

    layer.post_attention_hook = hook


def bind_metadata(
    runner: Any,
    adapter: RunnerAdapter,
    step: TierStep,
    tier_of_group: Mapping[int, int],
) -> None:
    """Give every cache group of a tier the tier's lengths.

    Args:
        runner: vLLM's runner.
        adapter: the same runner's.
        step: the worker's.
        tier_of_group: by vLLM's KV cache group.
    """
    if uses_native_hooks():
        adapter.bind_metadata(GroupMetadata(step, tier_of_group))
        return
    for group_id, tier in tier_of_group.items():
        for builder in builders_of(runner, group_id):
            assert isinstance(builder, TieredBuilder)
            builder.tiers, builder.tier = step, tier


def builders_of(runner: Any, group_id: int) -> Iterable[Any]:
    """The metadata builders of a cache group."""
    return (group.get_metadata_builder() for group in runner.attn_groups[group_id])


class GroupMetadata:
    """The lengths of each cache group, as vLLM's ``ModelSpecificAttnMetadata``.

    Args:
        step: the worker's.
        tier_of_group: by vLLM's KV cache group; others keep vLLM's lengths.
    """

    def __init__(self, step: TierStep, tier_of_group: Mapping[int, int]) -> None:
        self._step, self._tier_of_group = step, dict(tier_of_group)

    def customize_common_attn_metadata(
        self, kv_cache_group_id: int, common_attn_metadata: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """The group's lengths; its slots are written in place."""
        tier = self._tier_of_group.get(kv_cache_group_id)
        if tier is None:
            return common_attn_metadata
        return self._step.for_tier(tier, common_attn_metadata)

    def get_extra_common_attn_kwargs(self, *_: Any) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def get_extra_attn_kwargs(self, *_: Any) -> dict[str, Any]:
        """Nothing more."""
        return {}


class TieredModelState:
    """Mixed into the V2 runner's model state: lengths and slots before its metadata."""

    adapter: V2Runner | None = None
    """Set once the cache is allocated; until then it is stock."""
    group_metadata: GroupMetadata | None = None

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See vLLM's model state."""
        stock: Any = super()
        if self.adapter is not None:
            self.adapter.begin_attention(input_batch, block_tables, slot_mappings)
            kwargs["model_specific_attn_metadata"] = self.group_metadata
        metadata: dict[str, Any] = stock.prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, *args, **kwargs
        )
        return metadata


@cache
def _with_tiers(cls: type) -> type:
    return type(f"Tiered{cls.__name__}", (TieredModelState, cls), {})


def _model_state(vllm_config: VllmConfig, model: Any, cls: type) -> type:
    return cls if engine_policy(vllm_config) is None else _with_tiers(cls)


def register_model_state() -> None:
    """Let the V2 runners of engines with a policy have ``TieredModelState``."""
    from vllm.v1.worker.gpu.model_states import register_model_state_resolver

    register_model_state_resolver(_model_state)
