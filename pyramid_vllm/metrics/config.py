"""Marks the configuration of an engine whose front end can read the policy's stats.

The stats use the field of a KV connector. A front end without this plugin would take
them for those of a missing connector, and fail. So the scheduler sends them only if the
configuration still has a mark, which shows that every process that had it has loaded
this plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm import envs


class MarkedConfig(dict[str, Any]):
    """vLLM's ``additional_config``; unpickling it installs the plugin."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _marked, (dict(self),)


def _marked(additional_config: Mapping[str, Any]) -> MarkedConfig:
    from pyramid_vllm.metrics.install import install

    install()
    return MarkedConfig(additional_config)


def reaches_plugins(additional_config: Any) -> bool:
    """Whether every process with this configuration has installed the plugin."""
    # vLLM's Rust front end loads no plugin.
    is_python = not envs.VLLM_USE_RUST_FRONTEND
    return is_python and isinstance(additional_config, MarkedConfig)
