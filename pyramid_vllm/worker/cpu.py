"""vLLM's CPU worker with a KV policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.worker.cpu_worker import CPUWorker

from pyramid_vllm.attention.cpu import (
    PyramidCPUAttentionImpl,
    PyramidCPUMetadataBuilder,
    check_cpu_layout,
    cpu_views,
    register_cpu_backend,
)
from pyramid_vllm.checks import check_engine
from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.plan import PLAN_ATTRIBUTE, StepPlan
from pyramid_vllm.policy import KVPolicyError, LengthRule
from pyramid_vllm.spec import (
    TierAttentionSpec,
    length_rule,
    model_weights,
    request_policies,
)
from pyramid_vllm.worker.generators import make_rewindable
from pyramid_vllm.worker.groups import CacheGroup, GroupQueries, compress_groups
from pyramid_vllm.worker.layer import TieredLayer
from pyramid_vllm.worker.prune import RowPruner, decoder_layers
from pyramid_vllm.worker.rows import truncate_rows
from pyramid_vllm.worker.shared import RowCounters, WorkerState
from pyramid_vllm.worker.step import TierStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(f"vllm.{__name__}")


class PyramidCPUWorker(CPUWorker):
    """Runs the plan: lengths and slots by tier, compaction, shorter rows."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self.kv_policy = check_engine(vllm_config)
        register_cpu_backend()
        super().__init__(vllm_config, *args, **kwargs)
        self.tier_layers: list[TieredLayer] = []
        self.tier_state: WorkerState | None = None
        self._cache_groups: list[CacheGroup] = []
        self._has_failed = False
        """Since a step raised: its pages are freed, but rows still point to them."""

    def determine_available_memory(self) -> int:
        """Memory for the KV cache: stock vLLM's less the policy's own buffer.

        Raises:
            KVPolicyError: the buffer leaves no memory for the cache.
        """
        available = super().determine_available_memory()
        shape = self._group_queries_shape()
        if shape is None:
            return available
        num_bytes = GroupQueries.num_bytes(*shape)
        logger.info(
            "KV policy %s: %s bytes of the KV memory hold the queries that score "
            "generated tokens (%d layers, %d sequences, %d queries each)",
            self.kv_policy.name,
            f"{num_bytes:,}",
            *shape[:3],
        )
        if num_bytes >= available:
            raise KVPolicyError(
                f"kv_policy '{self.kv_policy.name}' needs {num_bytes:,} bytes for the "
                f"queries of max_num_seqs={shape[1]} sequences, of {available:,} for "
                "the whole KV cache: lower max_num_seqs or gen_queries"
            )
        return available - num_bytes

    def _group_queries_shape(
        self,
    ) -> tuple[int, int, int, tuple[int, int], torch.dtype] | None:
        """Arguments of ``GroupQueries``; None where the policy needs none."""
        if not (self.kv_policy.generation and self.kv_policy.needs_queries):
            return None
        model = self.model_config
        heads = model.get_num_attention_heads(self.parallel_config)
        return (
            num_full_attention_layers(model.hf_text_config),
            self.scheduler_config.max_num_seqs,
            self.kv_policy.gen_queries,
            (heads, model.get_head_size()),
            model.dtype,
        )

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The runner's specs, those of full attention in tiers."""
        specs = super().get_kv_cache_spec()
        names = [
            name for name, spec in specs.items() if type(spec) is FullAttentionSpec
        ]
        names.sort(key=extract_layer_index)
        expected = num_full_attention_layers(self.model_config.hf_text_config)
        if len(names) != expected:
            raise KVPolicyError(
                f"kv_policy does not support this model: {len(names)} of its layers "
                f"have full attention, its configuration says {expected}"
            )
        tiers = length_rule(self.kv_policy, len(names)).layout.tier_of_layer
        for name, tier in zip(names, tiers, strict=True):
            specs[name] = TierAttentionSpec.of(specs[name], tier, len(names))
        return specs

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, then bind builders and layers to their tiers."""
        super().initialize_from_config(kv_cache_config)
        runner = self.model_runner
        groups = runner.kv_cache_config.kv_cache_groups
        tiered = {
            group_id: group
            for group_id, group in enumerate(groups)
            if isinstance(group.kv_cache_spec, TierAttentionSpec)
        }
        names = [name for group in tiered.values() for name in group.layer_names]
        names.sort(key=extract_layer_index)
        policies = request_policies(
            self.kv_policy, len(names), model_weights(self.vllm_config)
        )
        rule = policies.rule
        (block_size,) = {g.kv_cache_spec.block_size for g in tiered.values()}
        shape = self._group_queries_shape()
        self.tier_state = WorkerState(
            step=TierStep(block_size, runner.input_batch),
            policies=policies.valid,
            pruner=self._make_pruner(rule, names) if rule.prunes else None,
            counters=RowCounters(len(names)),
            group_queries=GroupQueries(*shape) if shape else None,
        )
        for group_id, group in tiered.items():
            self._bind_group(group_id, group.kv_cache_spec.tier, names, rule)
        logger.info(
            "KV policy %s: %d layers of this worker are tiered",
            self.kv_policy.name,
            len(self.tier_layers),
        )

    def _make_pruner(self, rule: LengthRule, names: list[str]) -> RowPruner:
        groups = self.model_runner.kv_cache_config.kv_cache_groups
        if not all(isinstance(g.kv_cache_spec, TierAttentionSpec) for g in groups):
            raise KVPolicyError(
                "kv_policy does not support prune_from with this model: some of its "
                "layers have no full attention, and count positions by row"
            )
        model = self.model_runner.get_model()
        layers = decoder_layers(model, names)
        return RowPruner(model, layers, rule.layout.tier_of_layer)

    def _bind_group(
        self, group_id: int, tier: int, names: list[str], rule: LengthRule
    ) -> None:
        runner, state = self.model_runner, self.tier_state
        assert state is not None
        block_table = runner.input_batch.block_table[group_id]
        spec = runner.kv_cache_config.kv_cache_groups[group_id].kv_cache_spec
        if block_table.block_size != spec.block_size:
            raise KVPolicyError(
                f"kv_policy does not support block_size={spec.block_size}: the kernels "
                f"split it into blocks of {block_table.block_size}"
            )
        layers = []
        for attn_group in runner.attn_groups[group_id]:
            builder = attn_group.get_metadata_builder()
            if not isinstance(builder, PyramidCPUMetadataBuilder):
                raise KVPolicyError(
                    f"kv_policy does not support {type(builder).__name__}: "
                    "valid is the attention backend CPU_ATTN"
                )
            builder.tiers, builder.tier = state.step, tier
            # One spec and one backend: what holds for a layer holds for the group.
            context = self.compilation_config.static_forward_context
            check_cpu_layout(context[attn_group.layer_names[0]].kv_cache, builder.isa)
            for name in attn_group.layer_names:
                layers.append(self._bind_layer(name, names.index(name), rule))
        self.tier_layers += layers
        self._cache_groups.append(CacheGroup(group_id, tier, layers))

    def _bind_layer(self, name: str, index: int, rule: LengthRule) -> TieredLayer:
        layer = self.compilation_config.static_forward_context[name]
        impl = layer.impl
        assert isinstance(impl, PyramidCPUAttentionImpl)
        assert self.tier_state is not None
        impl.check_movable()
        tiers = rule.layout.tier_of_layer
        impl.tier_layer = TieredLayer(
            index=index,
            tier=tiers[index],
            prunes_next=(
                rule.prunes
                and index + 1 < len(tiers)
                and tiers[index + 1] > tiers[index]
            ),
            scale=impl.scale,
            logits_soft_cap=impl.logits_soft_cap,
            # The weights themselves, for they may be loaded anew.
            sink_logits=None if impl.sinks is None else impl.sinks.detach(),
            cache=cpu_views(layer.kv_cache),
            state=self.tier_state,
        )
        return impl.tier_layer

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step by its plan.

        Raises:
            RuntimeError: the step has no plan, a layer did not do its part, or an
                earlier step raised.
        """
        if self._has_failed:
            raise RuntimeError("KV policy: an earlier step failed; restart the engine")
        self._has_failed = True
        output = self._run_plan(scheduler_output)
        self._has_failed = False
        return output

    def _run_plan(self, scheduler_output: SchedulerOutput) -> Any:
        plan: StepPlan | None = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
        if plan is None:
            raise RuntimeError(
                "KV policy: a step came without a plan; the scheduler must be "
                "pyramid_vllm.scheduler.PyramidScheduler"
            )
        state = self.tier_state
        assert state is not None
        state.begin(plan)
        with state.pruning(plan):
            output = super().execute_model(scheduler_output)
        make_rewindable(self.model_runner)
        if plan.groups:
            compress_groups(
                plan,
                state.policies,
                self._cache_groups,
                state.group_queries,
                self.model_runner.input_batch,
            )
        state.finish(plan, len(self.tier_layers))
        truncate_rows(
            self.model_runner,
            {group.group_id: group.tier for group in self._cache_groups},
            plan,
        )
        return output
