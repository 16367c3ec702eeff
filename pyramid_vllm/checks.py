"""Refuses set-ups that the policy does not support, before the model loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyramid_vllm.compat import check_vllm_version
from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.policy import SCORERS, KVPolicyError, PolicyConfig
from pyramid_vllm.spec import TierAttentionSpec, length_rule, required_policy

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

LEGACY_RAY_EXECUTOR = "vllm.v1.executor.ray_executor.RayDistributedExecutor"


def check_engine(vllm_config: VllmConfig) -> PolicyConfig:
    """Refuse an engine that the policy does not support.

    Raises:
        KVPolicyError: names the setting, its value and what is valid.
    """
    check_vllm_version()
    policy = required_policy(vllm_config)
    _check_device(vllm_config)
    _check_parallel(vllm_config)
    _check_features(vllm_config, policy)
    if policy.prune_from is not None:
        _check_pruning(vllm_config, policy.prune_from)
    _check_model(vllm_config.model_config, policy)
    return policy


def check_kv_cache_config(kv_cache_config: KVCacheConfig) -> int:
    """Check that the engine's KV cache groups are tiered.

    Returns:
        The model's number of full-attention layers.

    Raises:
        KVPolicyError: no group is tiered, so nothing would be evicted.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    counts = {spec.num_layers for spec in specs if isinstance(spec, TierAttentionSpec)}
    if len(counts) != 1:
        raise KVPolicyError(
            "kv_policy needs pyramid_vllm's worker with its scheduler: worker_cls is "
            "another class, or the model has no layer with full attention"
        )
    return counts.pop()


def _refuse(setting: str, value: object, valid: str) -> KVPolicyError:
    return KVPolicyError(f"kv_policy does not support {setting}={value!r}: {valid}")


def _check_device(vllm_config: VllmConfig) -> None:
    device = vllm_config.device_config.device_type
    if device not in ("cpu", "cuda"):
        raise _refuse("device", device, "valid are 'cpu' and 'cuda'")
    if device == "cuda" and not vllm_config.use_v2_model_runner:
        raise _refuse(
            "vLLM's V1 model runner on device",
            device,
            "valid is the V2 runner: leave VLLM_USE_V2_MODEL_RUNNER unset; vLLM's log "
            "names the feature that the V2 runner does not support",
        )


def _check_parallel(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        value = getattr(parallel, name)
        if value > 1:
            raise _refuse(name, value, "valid is 1")
    if parallel.use_ubatching:
        raise _refuse("enable_dbo", True, "valid is False")
    _check_executor(vllm_config)


def _check_executor(vllm_config: VllmConfig) -> None:
    """Refuse vLLM's older Ray executor: its steps bypass the worker."""
    from vllm.v1.executor import Executor

    executor = Executor.get_class(vllm_config)
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in executor.__mro__}
    if LEGACY_RAY_EXECUTOR not in names:
        return
    backend = vllm_config.parallel_config.distributed_executor_backend
    if backend == "ray":
        raise _refuse("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", 0, "valid is 1")
    raise _refuse(
        "distributed_executor_backend",
        backend,
        f"{LEGACY_RAY_EXECUTOR} bypasses the worker; valid is 'ray'",
    )


def _check_pruning(vllm_config: VllmConfig, prune_from: int) -> None:
    """Refuse what counts the rows of a step in another place than the model."""
    if vllm_config.lora_config is not None:
        raise _refuse(
            "enable_lora with prune_from",
            prune_from,
            "adapters are chosen by row; valid is prune_from none or enable_lora False",
        )
    if not vllm_config.model_config.is_moe:
        return
    # Experts are sent the rows that the step has before it is pruned.
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1:
        raise _refuse(
            "data_parallel_size with prune_from",
            prune_from,
            f"data_parallel_size is {parallel.data_parallel_size}, and experts of "
            "other ranks count rows by step; valid is prune_from none or "
            "data_parallel_size 1",
        )
    if parallel.enable_expert_parallel:
        raise _refuse(
            "enable_expert_parallel with prune_from",
            prune_from,
            "experts of other ranks count rows by step; valid is prune_from none or "
            "enable_expert_parallel False",
        )


def _check_scheduler(vllm_config: VllmConfig) -> None:
    scheduler = vllm_config.scheduler_config
    if scheduler.disable_hybrid_kv_cache_manager:
        raise _refuse("disable_hybrid_kv_cache_manager", True, "valid is False")
    if not scheduler.scheduler_reserve_full_isl:
        # vLLM then asks for the pages of a first chunk alone.
        raise _refuse(
            "scheduler_reserve_full_isl",
            False,
            "admission would ignore a prompt's peak and growth_reserve; valid is True, "
            "and growth_reserve 0 to reserve nothing for generated tokens",
        )


def _check_speculation(vllm_config: VllmConfig, policy: PolicyConfig) -> None:
    if vllm_config.speculative_config is None:
        return
    method = vllm_config.speculative_config.method
    if vllm_config.use_v2_model_runner:
        raise _refuse(
            "speculative_config with vLLM's V2 model runner", method, "valid is none"
        )
    if method != "ngram":
        raise _refuse("speculative_config", method, "valid are 'ngram' and none")
    if policy.segments:
        raise _refuse(
            "speculative_config with evict",
            policy.evict,
            "drafts are not confirmed when segments are compressed; valid are "
            "'prompt_end' and 'chunk'",
        )
    if policy.generation:
        group = policy.exceed_length_to_compress
        raise _refuse(
            "speculative_config with exceed_length_to_compress",
            group,
            "drafts are not confirmed when groups are compressed; valid is none",
        )


def _check_features(vllm_config: VllmConfig, policy: PolicyConfig) -> None:
    cache = vllm_config.cache_config
    is_cuda = vllm_config.device_config.device_type == "cuda"
    if is_cuda and policy.scorer not in SCORERS:
        valid = ", ".join(repr(name) for name in SCORERS)
        raise _refuse("scorer", policy.scorer, f"valid on 'cuda' are {valid}")
    _check_speculation(vllm_config, policy)
    if vllm_config.kv_transfer_config is not None:
        connector = vllm_config.kv_transfer_config.kv_connector
        raise _refuse("kv_transfer_config", connector, "valid is none")
    unit = cache.prefix_match_unit
    if cache.enable_prefix_caching and unit not in (None, cache.block_size):
        valid = f"valid is block_size, {cache.block_size}: whole pages are shared"
        raise _refuse("prefix_match_unit", unit, valid)
    if cache.kv_sharing_fast_prefill:
        raise _refuse("kv_sharing_fast_prefill", True, "valid is False")
    _check_cache_dtype(cache.cache_dtype, vllm_config.use_v2_model_runner)
    _check_scheduler(vllm_config)
    if vllm_config.attention_config.hisparse_config is not None:
        raise _refuse("hisparse_config", "set", "valid is none")


def _check_cache_dtype(cache_dtype: str, is_v2: bool) -> None:
    plain = ("auto", "float16", "bfloat16", "float32")
    # Formats with one scale per layer: the policy moves bytes and scores their floats.
    quantized = ("fp8", "fp8_e4m3", "fp8_e5m2") if is_v2 else ()
    if cache_dtype not in (*plain, *quantized):
        valid = ", ".join(repr(name) for name in (*plain, *quantized))
        raise _refuse("kv_cache_dtype", cache_dtype, f"valid are {valid}")


def _check_model(model: ModelConfig, policy: PolicyConfig) -> None:
    if model.use_mla:
        raise _refuse("MLA attention", model.model, "valid are models with MHA or GQA")
    if model.runner_type != "generate":
        raise _refuse("runner", model.runner_type, "valid is 'generate'")
    if model.is_hybrid:
        raise _refuse("hybrid model", model.model, "valid are pure attention models")
    if model.rswa_window is not None:
        raise _refuse("rswa_window", model.rswa_window, "valid is none")
    if model.is_encoder_decoder:
        raise _refuse("encoder-decoder model", model.model, "valid are decoders")
    if model.is_mm_prefix_lm:
        raise _refuse(
            "attention in both directions to images",
            model.model,
            "valid are causal models, and limit_mm_per_prompt 0 for every modality",
        )
    num_layers = 0
    if not model.is_attention_free:
        num_layers = num_full_attention_layers(model.hf_text_config)
    # Some budgets cannot meet some retentions with this number of layers.
    length_rule(policy, num_layers).cache_lengths(1)
