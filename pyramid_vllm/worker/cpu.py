"""vLLM's CPU worker with a KV policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.worker.cpu_worker import CPUWorker

from pyramid_vllm.attention.cpu import (
    PyramidCPUAttentionImpl,
    PyramidCPUMetadataBuilder,
    check_cpu_layout,
    register_cpu_backend,
)
from pyramid_vllm.checks import check_engine
from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.plan import PLAN_ATTRIBUTE, StepPlan
from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.spec import TierAttentionSpec, length_rule
from pyramid_vllm.worker.layer import TieredLayer
from pyramid_vllm.worker.queries import QueryWindows
from pyramid_vllm.worker.rows import truncate_rows
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
        self.tier_queries = QueryWindows()
        self.tier_step: TierStep | None = None

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
        specs = [
            group.kv_cache_spec for group in runner.kv_cache_config.kv_cache_groups
        ]
        self._tier_groups = {
            group_id: spec.tier
            for group_id, spec in enumerate(specs)
            if isinstance(spec, TierAttentionSpec)
        }
        (block_size,) = {specs[group_id].block_size for group_id in self._tier_groups}
        self.tier_step = TierStep(block_size, runner.input_batch)
        for group_id, tier in self._tier_groups.items():
            self._bind_group(group_id, tier)
        logger.info(
            "KV policy %s: %d layers of this worker are tiered",
            self.kv_policy.name,
            len(self.tier_layers),
        )

    def _bind_group(self, group_id: int, tier: int) -> None:
        runner, step = self.model_runner, self.tier_step
        assert step is not None
        block_table = runner.input_batch.block_table[group_id]
        spec = runner.kv_cache_config.kv_cache_groups[group_id].kv_cache_spec
        if block_table.block_size != spec.block_size:
            raise KVPolicyError(
                f"kv_policy does not support block_size={spec.block_size}: the kernels "
                f"split it into blocks of {block_table.block_size}"
            )
        for attn_group in runner.attn_groups[group_id]:
            builder = attn_group.get_metadata_builder()
            if not isinstance(builder, PyramidCPUMetadataBuilder):
                raise KVPolicyError(
                    f"kv_policy does not support {type(builder).__name__}: "
                    "valid is the attention backend CPU_ATTN"
                )
            builder.tiers, builder.tier = step, tier
            # One spec and one backend: what holds for a layer holds for the group.
            layers = self.compilation_config.static_forward_context
            check_cpu_layout(layers[attn_group.layer_names[0]].kv_cache, builder.isa)
            for name in attn_group.layer_names:
                self._bind_layer(name, tier)

    def _bind_layer(self, name: str, tier: int) -> None:
        layer = self.compilation_config.static_forward_context[name]
        impl = layer.impl
        assert isinstance(impl, PyramidCPUAttentionImpl)
        assert self.tier_step is not None
        if self.kv_policy.needs_queries:
            impl.check_scorable()
        impl.tier_layer = TieredLayer(
            extract_layer_index(name),
            tier,
            impl.scale,
            impl.logits_soft_cap,
            self.kv_policy,
            self.tier_step,
            self.tier_queries,
        )
        self.tier_layers.append(impl.tier_layer)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step by its plan.

        Raises:
            RuntimeError: the step has no plan, or a layer did not do its part.
        """
        plan: StepPlan | None = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
        if plan is None:
            raise RuntimeError(
                "KV policy: a step came without a plan; the scheduler must be "
                "pyramid_vllm.scheduler.PyramidScheduler"
            )
        step = self.tier_step
        assert step is not None
        self.tier_queries.release(plan.released)
        step.begin(plan)
        output = super().execute_model(scheduler_output)
        step.finish(len(self.tier_layers))
        self.tier_queries.release(w.req_id for w in plan.windows if not w.retain)
        truncate_rows(self.model_runner, self._tier_groups, plan)
        return output
