"""The policy in vLLM's OpenTelemetry spans of requests.

Cause: vLLM builds a request's span in its front end, from fields that plugins cannot
extend. Only trace headers travel with a request and return with its last output.
Removal: once plugins can add attributes to spans, see ``patches/``. Without tracing
nothing changes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

    from pyramid_vllm.policy import LengthRule

#: Attributes of spans.
NAME = "vllm.kv_policy.name"
RETAINED = "vllm.kv_policy.retained_tokens"
RETAINED_BY_TIER = "vllm.kv_policy.retained_tokens_by_tier"

#: In addition to W3C's trace headers; never leaves the engine.
_HEADER = "x-vllm-kv-policy"
_INSTALLED = "_pyramid_vllm_installed"
_attributes: ContextVar[Mapping[str, Any]] = ContextVar("attributes")


def install() -> None:
    """Wrap vLLM's tracing of requests. Idempotent."""
    from vllm.v1.engine import output_processor

    processor: Any = output_processor.OutputProcessor
    if getattr(processor, _INSTALLED, False):
        return
    processor.do_tracing = _with_attributes_of(processor.do_tracing)
    module: Any = output_processor
    module.instrument_manual = _with_attributes(module.instrument_manual)
    setattr(processor, _INSTALLED, True)


def note_policy(request: EngineCoreRequest, rule: LengthRule) -> None:
    """Add a request's policy and kept prompt tokens to its span.

    Args:
        request: a request that goes to the engine.
        rule: the counts of its policy.
    """
    if request.prompt_token_ids is None:
        return
    kept = rule.cache_lengths(len(request.prompt_token_ids))
    attributes = {
        NAME: rule.config.name,
        RETAINED: rule.layout.mean(kept),
        RETAINED_BY_TIER: kept,
    }
    headers = dict(request.trace_headers or {})
    request.trace_headers = headers | {_HEADER: json.dumps(attributes)}


def _with_attributes_of(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def do_tracing(
        self: Any, engine_core_output: Any, *args: Any, **kwargs: Any
    ) -> None:
        noted = (engine_core_output.trace_headers or {}).get(_HEADER, "{}")
        token = _attributes.set(json.loads(noted))
        try:
            original(self, engine_core_output, *args, **kwargs)
        finally:
            _attributes.reset(token)

    return do_tracing


def _with_attributes(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def instrument_manual(*args: Any, **kwargs: Any) -> Any:
        own = _attributes.get({})
        if own:
            kwargs["attributes"] = {**(kwargs.get("attributes") or {}), **own}
        return original(*args, **kwargs)

    return instrument_manual
