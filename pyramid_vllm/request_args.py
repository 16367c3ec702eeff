"""Checks a request's policy arguments in the front end.

Cause: vLLM checks a request's ``extra_args`` only for logits processors. Removal: once
plugins can validate sampling parameters, see ``patches/``. Requests without policy
arguments pass unchanged, and so do all requests of an engine without a policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMClientError

from pyramid_vllm.metrics.tracing import note_policy
from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.policy import (
    NONE,
    POLICY_ARG,
    RETENTION_ARG,
    KVPolicyError,
    LengthRule,
    MemoryModel,
    RequestPolicies,
    asks_for_policy,
)
from pyramid_vllm.spec import (
    engine_policy,
    max_chunk,
    model_weights,
    request_policies,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

_INSTALLED = "_pyramid_vllm_installed"
_CHECK = "_pyramid_vllm_check"


def install() -> None:
    """Wrap vLLM's input processor. Idempotent."""
    from vllm.v1.engine.input_processor import InputProcessor

    if not getattr(InputProcessor, _INSTALLED, False):
        InputProcessor.process_inputs = _with_check(InputProcessor.process_inputs)
        setattr(InputProcessor, _INSTALLED, True)


class KVRequestError(VLLMClientError, KVPolicyError):
    """A request is refused; over HTTP with status 400."""


class RequestCheck:
    """Refuses requests that an engine cannot serve, before the engine gets them.

    Args:
        vllm_config: the engine's configuration.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config
        policy = engine_policy(vllm_config)
        self._policies: RequestPolicies | None = None
        if policy is not None:
            hf_config = vllm_config.model_config.hf_text_config
            num_layers = num_full_attention_layers(hf_config)
            self._policies = request_policies(
                policy, num_layers, model_weights(vllm_config)
            )

    def trace(self, rule: LengthRule | None, request: EngineCoreRequest) -> None:
        """Add the policy to a traced request's span; ``rule``: from ``before``."""
        traces = self._config.observability_config.otlp_traces_endpoint is not None
        if traces and self._policies is not None:
            note_policy(request, rule or self._policies.rule)

    def before(self, params: Any, resumable: bool) -> LengthRule | None:
        """Check the policy arguments of a new request.

        Returns:
            The counts of its policy; None: it has no policy arguments.

        Raises:
            KVPolicyError: names the argument, its value and what is valid.
        """
        if self._policies is not None and resumable:
            raise KVPolicyError(
                "resumable is True: a KV policy evicts at the prompt's end; valid "
                "is False"
            )
        extra_args: dict[str, Any] = getattr(params, "extra_args", None) or {}
        if not asks_for_policy(extra_args):
            return None
        if self._policies is not None:
            return self._policies.rule_for(extra_args)
        if extra_args.get(POLICY_ARG, "") != NONE or RETENTION_ARG in extra_args:
            raise KVPolicyError(
                f"{POLICY_ARG} is {extra_args.get(POLICY_ARG)!r}: this server runs "
                f"without a KV policy, valid is '{NONE}'"
            )
        return None

    def after(self, rule: LengthRule, request: EngineCoreRequest) -> None:
        """Check that the whole KV cache can hold the prompt.

        Raises:
            KVPolicyError: names the policy and the memory.
        """
        cache = self._config.cache_config
        # `num_gpu_blocks` is the sum over the engines of a data-parallel group.
        num_engines = self._config.parallel_config.data_parallel_size
        if not cache.num_gpu_blocks or request.prompt_token_ids is None:
            return
        num_prompt = len(request.prompt_token_ids)
        chunk = max_chunk(self._config)
        memory = MemoryModel(rule, cache.block_size, layer_page_bytes=1)
        needed = memory.pages(rule.peak_lengths(num_prompt, num_prompt, chunk))
        valid = cache.num_gpu_blocks // num_engines - 1
        if needed > valid:
            raise KVPolicyError(
                f"{POLICY_ARG} is {rule.config.name!r}: a prompt of {num_prompt} "
                f"tokens needs {needed} pages of the KV cache, which has {valid}"
            )


def _with_check(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_inputs(
        self: InputProcessor,
        request_id: str,
        prompt: Any,
        params: Any,
        *args: Any,
        **kwargs: Any,
    ) -> EngineCoreRequest:
        check: RequestCheck | None = getattr(self, _CHECK, None)
        if check is None:
            check = RequestCheck(self.vllm_config)
            setattr(self, _CHECK, check)
        try:
            rule = check.before(params, kwargs.get("resumable", False))
            request = original(self, request_id, prompt, params, *args, **kwargs)
            if rule is not None:
                check.after(rule, request)
            check.trace(rule, request)
        except KVPolicyError as error:
            raise KVRequestError(str(error)) from None
        return request

    return process_inputs
