"""A pyramid KV cache for stock vLLM: fewer tokens in deeper layers.

Importing this package makes ``LLM(..., kv_policy="pyramid")`` work. The README has the
other ways to use it.
"""

from pyramid_vllm._arguments_on_import import expect_vllm
from pyramid_vllm.policy import (
    KVPolicyError,
    PolicyConfig,
    preset_names,
    resolve_policy,
)

__version__ = "0.1.0"
__all__ = ["KVPolicyError", "PolicyConfig", "preset_names", "resolve_policy"]

expect_vllm()
