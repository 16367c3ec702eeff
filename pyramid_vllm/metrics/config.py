"""The configuration of an engine whose front end expects the policy's stats.

The stats take the way that a KV connector's would take. A front end that knows nothing
of the policy would take them for those of a connector that it does not have, and fail.
So they are sent only where the configuration has kept the mark which says that every
process that had it in hand has loaded this plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm import envs


class MarkedConfig(dict[str, Any]):
    """vLLM's ``additional_config``; whoever unpickles it has the plugin at work."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _marked, (dict(self),)


def _marked(additional_config: Mapping[str, Any]) -> MarkedConfig:
    from pyramid_vllm.metrics.install import install

    install()
    return MarkedConfig(additional_config)


def reaches_plugins(additional_config: Any) -> bool:
    """Whether every process that has the configuration has this plugin at work."""
    # vLLM's Rust front end loads no plugin.
    is_python = not envs.VLLM_USE_RUST_FRONTEND
    return is_python and isinstance(additional_config, MarkedConfig)
