"""vLLM's own hooks in the places of our overrides, on a vLLM that has them.

The hooks are those of the repository's ``patches/``. No release of vLLM has them, so
they are asked for by an environment variable, which ``scripts/check-patches`` sets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from pyramid_vllm.policy import KVPolicyError

if TYPE_CHECKING:
    from pyramid_vllm.plan import StepPlan

#: Set to "1" by whoever runs a patched vLLM.
SWITCH = "PYRAMID_VLLM_NATIVE_HOOKS"


@cache
def uses_native_hooks() -> bool:
    """Whether vLLM's hooks are used, in this process.

    Raises:
        KVPolicyError: the variable's value is not valid.
    """
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise KVPolicyError(f"{SWITCH} is {value!r}: valid are '0' and '1'")
    return value == "1"


def check_native_hooks() -> None:
    """Check that vLLM has the hooks, where they are asked for.

    Raises:
        KVPolicyError: names the patches that are missing.
    """
    if not uses_native_hooks():
        return
    missing = [patch for patch, is_there in _HOOKS.items() if not is_there()]
    if missing:
        raise KVPolicyError(
            f"{SWITCH}=1 needs a vLLM with patches/: this one lacks "
            f"{', '.join(missing)}; valid is 0"
        )


def mark_eager(output: Any, plan: StepPlan) -> None:
    """Keep a step out of the CUDA graphs that would pass over its windows.

    Args:
        output: vLLM's ``SchedulerOutput``.
        plan: of the same step.
    """
    from vllm.v1.core.sched.output import EagerScope

    if plan.prunes:
        output.requires_eager = EagerScope.MODEL
    elif plan.windows:
        output.requires_eager = EagerScope.ATTENTION


def _has_registry_order() -> bool:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    return hasattr(KVCacheSpecRegistry, "_has_builtins")


def _has_merge() -> bool:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return "merged_fields" in FullAttentionSpec.merge.__func__.__code__.co_varnames


def _has_group_key() -> bool:
    from vllm.v1.kv_cache_interface import KVCacheSpec

    return hasattr(KVCacheSpec, "group_key")


def _has_layer_spec() -> bool:
    from vllm.v1.attention.backend import AttentionBackend

    return hasattr(AttentionBackend, "customize_layer_spec")


def _has_truncate() -> bool:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    return hasattr(SingleTypeKVCacheManager, "truncate")


def _has_output_field(name: str) -> Callable[[], bool]:
    def is_there() -> bool:
        from vllm.v1.core.sched.output import SchedulerOutput

        return name in SchedulerOutput.__dataclass_fields__

    return is_there


def _has_group_metadata() -> bool:
    from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

    return hasattr(ModelSpecificAttnMetadata, "customize_common_attn_metadata")


def _has_model_states() -> bool:
    from vllm.v1.worker.gpu import model_states

    return hasattr(model_states, "register_model_state_resolver")


def _has_post_attention() -> bool:
    from vllm.model_executor.layers.attention import Attention

    return "post_attention_hook" in Attention.__init__.__code__.co_names


#: By the name of the patch that brings it.
_HOOKS: dict[str, Callable[[], bool]] = {
    "registry-built-ins-first": _has_registry_order,
    "merge-keeps-subclass-fields": _has_merge,
    "explicit-group-key": _has_group_key,
    "spec-by-layer-name": _has_layer_spec,
    "manager-truncate": _has_truncate,
    "scheduler-output-truncations": _has_output_field("kv_cache_truncations"),
    "scheduler-output-plugin-metadata": _has_output_field("plugin_metadata"),
    "metadata-by-group": _has_group_metadata,
    "model-state-registry": _has_model_states,
    "requires-eager-by-step": _has_output_field("requires_eager"),
    "post-attention-hook": _has_post_attention,
}
