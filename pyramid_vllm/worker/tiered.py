"""What every worker with a KV policy does, whatever its device and runner."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from pyramid_vllm.attention.registry import register_backends
from pyramid_vllm.attention.specs import tiered_specs
from pyramid_vllm.checks import check_engine
from pyramid_vllm.limits import PromptLimits
from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.plan import plan_of
from pyramid_vllm.policy import KVPolicyError, LengthRule
from pyramid_vllm.spec import (
    TierAttentionSpec,
    model_weights,
    request_policies,
)
from pyramid_vllm.worker.binding import LayerBinder, bind_builders
from pyramid_vllm.worker.cache_group import CacheGroup, compress_generated
from pyramid_vllm.worker.counters import WorkerCounters
from pyramid_vllm.worker.generated import GeneratedQueries, QueryShape
from pyramid_vllm.worker.memory import OwnBuffer
from pyramid_vllm.worker.prune import RowPruner, decoder_layers
from pyramid_vllm.worker.remote import RemoteCalls
from pyramid_vllm.worker.runners.adapter import RunnerAdapter, adapter_of
from pyramid_vllm.worker.runners.guard import guard_runner
from pyramid_vllm.worker.state import WorkerState
from pyramid_vllm.worker.step import TierStep
from pyramid_vllm.worker.timing import DeviceTimer, HostTimer, with_times
from pyramid_vllm.worker.warmup import QueryKinds, compile_kernels

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(f"vllm.{__name__}")


class TieredWorker(RemoteCalls):
    """Mixed into a stock worker: runs the plan, by tier.

    Lengths and slots by tier, compaction, shorter rows.
    """

    model_runner: Any
    model_config: Any
    parallel_config: Any
    scheduler_config: Any
    compilation_config: Any
    vllm_config: VllmConfig
    use_v2_model_runner: bool

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self.kv_policy = check_engine(vllm_config)
        register_backends()
        stock: Any = super()
        stock.__init__(vllm_config, *args, **kwargs)
        self.tier_layers = []
        self.tier_state = None
        self.adapter: RunnerAdapter | None = None
        self._groups: list[CacheGroup] = []
        self._attention: list[Any] = []
        """vLLM's layers that are tiered."""
        self._tier_of_group: dict[int, int] = {}
        self._is_warming_up = False
        self._has_failed = False
        """Since a step raised: its pages are freed, but rows still point to them."""

    def init_device(self) -> None:
        """Make the runner; its specs are those of tiers from now on."""
        stock: Any = super()
        stock.init_device()
        # The runner's own: memory for graphs is estimated on them, past the worker.
        runner = self.model_runner
        stock_specs = runner.get_kv_cache_spec
        expected = num_full_attention_layers(self.model_config.hf_text_config)
        runner.get_kv_cache_spec = lambda: tiered_specs(
            stock_specs(), self.kv_policy, expected
        )

    def determine_available_memory(self) -> int:
        """Memory for the KV cache: stock vLLM's less the policy's own buffers.

        Raises:
            KVPolicyError: the buffers leave no memory for the cache.
        """
        stock: Any = super()
        available: int = stock.determine_available_memory()
        buffers = self.own_buffers()
        for buffer in buffers:
            logger.info(
                "KV policy %s: bytes of memory: %s", self.kv_policy.name, buffer
            )
        num_bytes = sum(buffer.num_bytes for buffer in buffers)
        if num_bytes >= available:
            raise KVPolicyError(
                f"kv_policy '{self.kv_policy.name}' needs {num_bytes:,} bytes, of "
                f"{available:,} for the whole KV cache: "
                f"{'; '.join(map(str, buffers))}. Valid is less: lower max_num_seqs, "
                "gen_queries, max_model_len or max_num_batched_tokens, or raise "
                "long_prefill_token_threshold"
            )
        return available - num_bytes

    def own_buffers(self) -> list[OwnBuffer]:
        """The policy's own buffers, each as large as it may become."""
        shape = self._query_shape()
        if shape is None:
            return []
        use = (
            f"queries that score generated tokens (max_num_seqs={shape.max_num_seqs}, "
            f"gen_queries={shape.num_queries})"
        )
        return [OwnBuffer(shape.num_bytes, use)]

    def _query_shape(self) -> QueryShape | None:
        """Queries of generated tokens; None where the policy needs none."""
        policy = self.kv_policy
        if not (policy.needs_queries and (policy.generation or policy.segments)):
            return None
        return self.query_shape(
            self.scheduler_config.max_num_seqs, self.kv_policy.gen_queries
        )

    def query_shape(self, max_num_seqs: int, num_queries: int) -> QueryShape:
        """Size of a buffer of queries of this worker's layers."""
        model = self.model_config
        return QueryShape(
            num_full_attention_layers(model.hf_text_config),
            max_num_seqs,
            num_queries,
            model.get_num_attention_heads(self.parallel_config),
            model.get_head_size(),
            model.dtype,
        )

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, then bind builders and layers to their tiers."""
        stock: Any = super()
        stock.initialize_from_config(kv_cache_config)
        groups = self.model_runner.kv_cache_config.kv_cache_groups
        tiered = {
            group_id: group
            for group_id, group in enumerate(groups)
            if isinstance(group.kv_cache_spec, TierAttentionSpec)
        }
        self._tier_of_group = {
            group_id: group.kv_cache_spec.tier for group_id, group in tiered.items()
        }
        names = [name for group in tiered.values() for name in group.layer_names]
        names.sort(key=extract_layer_index)
        (block_size,) = {g.kv_cache_spec.block_size for g in tiered.values()}
        self.adapter = adapter_of(self.model_runner, self.use_v2_model_runner)
        self._bind(names, block_size)
        logger.info(
            "KV policy %s: %d layers of this worker are tiered",
            self.kv_policy.name,
            len(self.tier_layers),
        )

    def _bind(self, names: list[str], block_size: int) -> None:
        """Build what the layers share, and bind them to it."""
        policies = request_policies(
            self.kv_policy, len(names), model_weights(self.vllm_config)
        )
        runner, adapter, rule = self.model_runner, self.adapter, policies.rule
        assert adapter is not None
        context = self.compilation_config.static_forward_context
        self._attention = [context[name] for name in names]
        binder = LayerBinder(runner, adapter, context, names, rule)
        kernels = binder.access(names[0]).kernels()
        kernels.check_policies(policies.valid.values())
        step = TierStep(
            block_size,
            adapter,
            runner,
            self._tier_of_group,
            policies.valid,
            kernels,
        )
        adapter.prepare = step.prepare
        shape, device = self._query_shape(), runner.device
        if shape is not None:
            step.generated = GeneratedQueries(
                shape,
                runner.max_num_tokens,
                device,
                kernels,
                of_prompts=self.kv_policy.segments,
            )
        state = self.tier_state = WorkerState(
            step=step,
            policies=policies.valid,
            pruner=self._make_pruner(rule, names) if rule.prunes else None,
            counters=WorkerCounters(len(names)),
            max_scores=PromptLimits.of(self.vllm_config).max_scores,
            timer=DeviceTimer() if device.type == "cuda" else HostTimer(),
        )
        bind_builders(runner, step, self._tier_of_group)
        bound = [binder.bind(group_id, state) for group_id in self._tier_of_group]
        self._groups = [parts[0].group for parts in bound]
        self.tier_layers = sorted(chain(*bound), key=lambda layer: layer.index)
        guard_runner(runner, step)

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

    def compile_or_warm_up_model(self) -> Any:
        """Warm up and capture; such steps carry no plan."""
        stock: Any = super()
        self._is_warming_up = True
        times = stock.compile_or_warm_up_model()
        self._is_warming_up = False
        state = self.tier_state  # a model without a KV cache has none
        if state is not None and state.step.kernels.IS_COMPILED:
            count = compile_kernels(self._groups, state, self._query_kinds())
            logger.info(
                "KV policy %s: warmed up by %d launches", self.kv_policy.name, count
            )
        return times

    def _query_kinds(self) -> QueryKinds:
        model = self.model_config
        quantized = current_platform.fp8_dtype()
        return QueryKinds(
            num_heads=model.get_num_attention_heads(self.parallel_config),
            hidden_size=model.get_hidden_size(),
            dtype=model.dtype,
            query_dtypes=frozenset(
                quantized if layer.query_quant is not None else model.dtype
                for layer in self._attention
            ),
        )

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step by its plan.

        Raises:
            RuntimeError: the step has no plan, a layer did not do its part, or an
                earlier step raised.
        """
        stock: Any = super()
        if self._is_warming_up:
            return stock.execute_model(scheduler_output)
        if self._has_failed:
            raise RuntimeError("KV policy: an earlier step failed; restart the engine")
        self._has_failed = True
        output = self._run_plan(scheduler_output, stock)
        self._has_failed = False
        return output

    def _run_plan(self, scheduler_output: SchedulerOutput, stock: Any) -> Any:
        plan = plan_of(scheduler_output)
        if plan is None:
            raise RuntimeError(
                "KV policy: a step came without a plan; the scheduler must be "
                "pyramid_vllm.scheduler.PyramidScheduler"
            )
        state, adapter = self.tier_state, self.adapter
        assert state is not None
        assert adapter is not None
        state.begin(plan)
        adapter.begin(plan)
        with state.pruning(plan):
            output = stock.execute_model(scheduler_output)
        if state.record is not None and plan.num_reqs:
            state.record.end_forward(plan, state.step.rows)
        adapter.after_forward()
        if plan.generated:
            # As the runner's step, whose buffers are written here.
            with state.timer.part(), torch.inference_mode():
                compress_generated(self._groups, state)
        state.finish(plan, len(self.tier_layers))
        num_freed = adapter.truncate(self._tier_of_group, plan)
        if num_freed and not state.counters.num_pages_freed:
            logger.info(
                "KV policy %s: this worker frees its first %d pages, in step %d",
                self.kv_policy.name,
                num_freed,
                state.counters.num_plans + 1,
            )
        state.counters.finish(plan, num_freed)
        state.timer.end_step(has_compacted=bool(plan.compactions))
        return self._finished(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; the output carries how long compactions took."""
        stock: Any = super()
        return self._finished(stock.sample_tokens(*args, **kwargs))

    def _finished(self, output: Any) -> Any:
        """A step's output, which is checked before its tokens leave."""
        state = self.tier_state
        if state is None:
            return output
        generated = state.step.generated
        check = None if generated is None else generated.check
        return with_times(output, state.timer, check)
