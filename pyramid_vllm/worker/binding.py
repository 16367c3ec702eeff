"""Binds vLLM's attention layers to their parts in the policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from pyramid_vllm.attention.registry import WRAPPED, access_of
from pyramid_vllm.attention.tiered import TieredBackend, TieredBuilder
from pyramid_vllm.kernels.spans import Attention
from pyramid_vllm.policy import KVPolicyError, LengthRule
from pyramid_vllm.worker.cache_group import CacheGroup, LayerConstants
from pyramid_vllm.worker.layer import TieredLayer
from pyramid_vllm.worker.scales import KeyScales, scale_of

if TYPE_CHECKING:
    from pyramid_vllm.attention.access import KVAccess
    from pyramid_vllm.worker.runners.adapter import RunnerAdapter
    from pyramid_vllm.worker.state import WorkerState
    from pyramid_vllm.worker.step import TierStep


def builders_of(runner: Any, group_id: int) -> Iterable[Any]:
    """The metadata builders of a cache group."""
    return (group.get_metadata_builder() for group in runner.attn_groups[group_id])


def bind_builders(
    runner: Any, step: TierStep, tier_of_group: Mapping[int, int]
) -> None:
    """Give the metadata builders of every tier the tier's lengths.

    Args:
        runner: vLLM's runner.
        step: the worker's.
        tier_of_group: by vLLM's KV cache group.
    """
    for group_id, tier in tier_of_group.items():
        for builder in builders_of(runner, group_id):
            assert isinstance(builder, TieredBuilder)
            builder.bind(step, tier)


class LayerBinder:
    """One worker's layers.

    Args:
        runner: vLLM's runner, once its cache is allocated.
        adapter: the same runner's.
        context: vLLM's attention layers, by name.
        names: the tiered ones, first to last.
        rule: the engine's.
    """

    def __init__(
        self,
        runner: Any,
        adapter: RunnerAdapter,
        context: dict[str, Any],
        names: Sequence[str],
        rule: LengthRule,
    ) -> None:
        self._runner, self._adapter, self._context = runner, adapter, context
        self._names, self._rule = names, rule

    def access(self, name: str) -> KVAccess:
        """How a layer's cache is read and written.

        Raises:
            KVPolicyError: its backend is not one that we wrap.
        """
        layer = self._context[name]
        if not issubclass(layer.attn_backend, TieredBackend):
            raise KVPolicyError(
                f"kv_policy does not support attention by {type(layer.impl).__name__}: "
                f"valid are {', '.join(backend.name for backend in WRAPPED)}"
            )
        return access_of(layer)

    def bind(self, group_id: int, state: WorkerState) -> list[TieredLayer]:
        """Bind the layers of one cache group.

        Returns:
            Their parts in the policy, first to last.

        Raises:
            KVPolicyError: a layer's attention, or where it keeps what it caches, is
                not supported.
        """
        self._check_block_size(group_id)
        groups = self._runner.attn_groups[group_id]
        for group, builder in zip(
            groups, builders_of(self._runner, group_id), strict=True
        ):
            # One spec and one backend: what holds for a layer holds for the group.
            self.access(group.layer_names[0]).check(builder)
        members = [name for group in groups for name in group.layer_names]
        members.sort(key=extract_layer_index)
        constants = [self._constants(name) for name in members]
        tier = self._rule.layout.tier_of_layer[constants[0].index]
        attention = self._attention(members, state)
        cache_group = CacheGroup(group_id, tier, constants, attention)
        parts = []
        for place, (name, one) in enumerate(zip(members, constants, strict=True)):
            layer = self._context[name]
            scale = partial(scale_of, layer, "_q_scale")
            part = TieredLayer(one, cache_group, place, state, scale)
            layer.impl.tier_layer = part
            parts.append(part)
        return parts

    def _check_block_size(self, group_id: int) -> None:
        groups = self._runner.kv_cache_config.kv_cache_groups
        block_size = groups[group_id].kv_cache_spec.block_size
        kernel_block_size = self._adapter.kernel_block_size(group_id)
        if kernel_block_size != block_size:
            raise KVPolicyError(
                f"kv_policy does not support block_size={block_size}: the kernels "
                f"split it into blocks of {kernel_block_size}"
            )

    def _constants(self, name: str) -> LayerConstants:
        access, index = self.access(name), self._names.index(name)
        access.check_movable()
        tiers = self._rule.layout.tier_of_layer
        prunes_next = (
            self._rule.prunes
            and index + 1 < len(tiers)
            and tiers[index + 1] > tiers[index]
        )
        return LayerConstants(index, prunes_next, access.views(access.layer.kv_cache))

    def _attention(self, names: Sequence[str], state: WorkerState) -> Attention:
        """What the attention of a group's layers is; ``state`` keeps it current.

        Raises:
            KVPolicyError: they differ in what a launch has one value of.
        """
        layers = [self._context[name] for name in names]
        impls = [layer.impl for layer in layers]
        kinds = {
            (impl.scale, impl.logits_soft_cap or 0.0, impl.sinks is None)
            for impl in impls
        }
        if len(kinds) > 1:
            raise KVPolicyError(
                "kv_policy does not support layers of one tier that differ in scale, "
                f"logits_soft_cap or sinks: they have {sorted(map(str, kinds))}"
            )
        ((scale, soft_cap, _),) = kinds
        sinks = [impl.sinks.detach() for impl in impls if impl.sinks is not None]
        device = layers[0].kv_cache.device
        key_scales = KeyScales(layers, device)
        state.key_scales.append(key_scales)
        return Attention(
            scale=scale,
            logits_soft_cap=soft_cap,
            sink_logits=sinks or None,
            query_scale=torch.ones(1, dtype=torch.float32, device=device),
            key_scales=key_scales.addresses,
        )
