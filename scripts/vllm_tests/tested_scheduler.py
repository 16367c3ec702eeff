"""Our scheduler for a test that describes vLLM's: one KV cache group, no policy."""

from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from pyramid_vllm.checks import check_engine
from pyramid_vllm.metrics.config import MarkedConfig
from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.policy.tiers import TierLayout
from pyramid_vllm.scheduler import PyramidScheduler
from pyramid_vllm.spec import POLICY_KEY, TierAttentionSpec, length_rule


def tiered(config: KVCacheConfig, layout: TierLayout) -> KVCacheConfig:
    """A KV cache whose groups with full attention are tiers, with as many pages for
    each group as before. The first tier has the place of the group."""
    groups, later = [], []
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        if type(spec) is not FullAttentionSpec:
            groups.append(group)
            continue
        first, *others = (
            replace(
                group, kv_cache_spec=TierAttentionSpec.of(spec, tier, layout.num_layers)
            )
            for tier in range(layout.num_tiers)
        )
        groups.append(first)
        later += others
    groups += later
    num_pages = (config.num_blocks - 1) * len(groups) // len(config.kv_cache_groups)
    return replace(config, num_blocks=num_pages + 1, kv_cache_groups=groups)


def with_policy(policy: dict[str, Any]) -> type[PyramidScheduler]:
    """The scheduler's class for an engine with a policy."""

    class TestedScheduler(PyramidScheduler):
        """Brings the policy and the tiers that the test's configuration lacks."""

        def __init__(
            self,
            vllm_config: VllmConfig,
            kv_cache_config: KVCacheConfig,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            vllm_config.additional_config = MarkedConfig({POLICY_KEY: policy})
            checked = check_engine(vllm_config)
            text = vllm_config.model_config.hf_text_config
            layout = length_rule(checked, num_full_attention_layers(text)).layout
            config = tiered(kv_cache_config, layout)
            vllm_config.cache_config.num_gpu_blocks = config.num_blocks
            super().__init__(vllm_config, config, *args, **kwargs)

    return TestedScheduler
