"""Schedulers, block pools and prefix caches of the installed vLLM, without a worker."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyramid_vllm.policy import PolicyConfig
from pyramid_vllm.tools.simulate.model import ModelWork

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

#: The token that is always sampled. Prompts differ, so answers need not.
SAMPLED_TOKEN = 7


@dataclass(frozen=True)
class EngineSettings:
    """The arguments of vLLM's engine, the same on every side."""

    model: ModelWork
    kv_bytes: int
    """KV memory of one device."""
    max_model_len: int | None
    """Tokens of the longest request; None: the model's."""
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    prefix_caching: bool = True
    async_scheduling: bool = True


class SimulatedEngine:
    """A scheduler, stock or with a policy, and the requests that it understands.

    Args:
        settings: of the engine.
        policy: the side's; None: stock vLLM.

    Raises:
        ValueError: the model, its longest request or the policy does not fit; names
            the setting, its value and what is valid.
    """

    def __init__(self, settings: EngineSettings, policy: PolicyConfig | None) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import (
            get_request_block_hasher,
            init_none_hash,
            resolve_kv_cache_block_sizes,
        )

        self.settings = settings
        self._config = config = _engine_config(settings, policy)
        specs = _specs(config, settings, policy)
        (self._kv_config,) = _planning().get_kv_cache_configs(
            config, [specs], [settings.kv_bytes]
        )
        config.cache_config.num_gpu_blocks = self._kv_config.num_blocks
        self._block_sizes = resolve_kv_cache_block_sizes(self._kv_config, config)
        self.max_model_len = int(config.model_config.max_model_len)
        self._hasher: Any = None
        # vLLM's engine core hashes nothing without a prefix cache either.
        if settings.prefix_caching:
            init_none_hash(sha256)
            self._hasher = get_request_block_hasher(self._block_sizes[1], sha256)
        self.scheduler: Any
        self.restart()

    def restart(self) -> None:
        """Make a new scheduler, with an empty pool and prefix cache."""
        from vllm.v1.structured_output import StructuredOutputManager

        block_size, hash_block_size = self._block_sizes
        self.scheduler = self._config.scheduler_config.get_scheduler_cls()(
            vllm_config=self._config,
            kv_cache_config=self._kv_config,
            structured_output_manager=StructuredOutputManager(self._config),
            block_size=block_size,
            hash_block_size=hash_block_size,
            log_stats=False,
        )

    def request(
        self, name: str, prompt: list[int], num_outputs: int, arrival: float
    ) -> Request:
        """A greedy request of ``num_outputs`` tokens, ``arrival`` seconds after the
        start."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        return Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                temperature=0.0, max_tokens=num_outputs, ignore_eos=True
            ),
            pooling_params=None,
            arrival_time=arrival,
            block_hasher=self._hasher,
        )


def sampled(scheduler: Any, step: SchedulerOutput) -> ModelRunnerOutput:
    """What a runner returns for a step: a token for each request whose known tokens
    are computed."""
    from vllm.v1.outputs import ModelRunnerOutput

    tokens = {
        req_id: [] if scheduler.requests[req_id].is_prefill_chunk else [SAMPLED_TOKEN]
        for req_id in step.num_scheduled_tokens
    }
    return ModelRunnerOutput(
        req_ids=list(tokens),
        req_id_to_index={req_id: i for i, req_id in enumerate(tokens)},
        sampled_token_ids=list(tokens.values()),
    )


def _engine_config(settings: EngineSettings, policy: PolicyConfig | None) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from pyramid_vllm.engine_args import install

    install()
    with tempfile.TemporaryDirectory() as folder:
        # vLLM checks a model's quantization against the device that it finds, which
        # is not the one that is simulated. The clock knows the weights' bytes.
        content = dict(settings.model.config)
        content.pop("quantization_config", None)
        text = json.dumps(content)
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        config = EngineArgs(
            model=folder,
            dtype=settings.model.dtype,
            skip_tokenizer_init=True,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            enable_prefix_caching=settings.prefix_caching,
            max_model_len=settings.max_model_len,
            kv_policy=policy and policy.model_dump(),
        ).create_engine_config()
    # The platform of this machine has chosen other values for these.
    config.cache_config.block_size = settings.block_size
    config.cache_config.kv_cache_layout = "LBNHC"
    config.scheduler_config.async_scheduling = settings.async_scheduling
    return config


def _planning() -> Any:
    """The module in which vLLM plans KV caches: since 0.33, its own module."""
    name = "vllm.v1.core.kv_cache_planning"
    return import_module(name if find_spec(name) else "vllm.v1.core.kv_cache_utils")


def _specs(
    config: Any, settings: EngineSettings, policy: PolicyConfig | None
) -> dict[str, KVCacheSpec]:
    """The KV cache specs that workers of one device would give the engine."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from pyramid_vllm.spec import TierAttentionSpec, length_rule, required_policy

    model = settings.model
    sizes: dict[str, Any] = {
        "block_size": settings.block_size,
        "num_kv_heads": model.num_kv_heads_per_device,
        "head_size": model.head_size,
        "dtype": getattr(torch, model.dtype),
    }
    specs: dict[str, KVCacheSpec] = {}
    num_full = model.windows.count(None)
    tiers: Iterator[int] | None = None
    if policy is not None:
        from pyramid_vllm.scheduler.block_manager import register_spec

        register_spec(config)
        layout = length_rule(required_policy(config), num_full).layout
        tiers = iter(layout.tier_of_layer)
    for layer, window in enumerate(model.windows):
        spec: KVCacheSpec = FullAttentionSpec(**sizes)
        if window is not None:
            spec = SlidingWindowSpec(sliding_window=window, **sizes)
        elif tiers is not None:
            spec = TierAttentionSpec.of(spec, next(tiers), num_full)
        specs[f"model.layers.{layer}.self_attn.attn"] = spec
    return specs
