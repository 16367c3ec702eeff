"""Puts the policy's stats where vLLM shows those of a KV connector.

Cause: vLLM's scheduler stats have no field for plugins. Its plugin group of stat
loggers turns statistics on for every server of an environment, ignores ``LLM``, and
registers before vLLM's logger removes all metrics named ``vllm:``. Removal: once
``SchedulerStats`` has a field for plugins, see ``patches/``. Without a policy every
wrapper calls vLLM's function unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyramid_vllm.metrics import tracing
from pyramid_vllm.spec import engine_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_INSTALLED = "_pyramid_vllm_installed"


def install() -> None:
    """Wrap vLLM's loggers. Idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm
    from vllm.v1.metrics.loggers import LoggingStatLogger

    tracing.install()
    if getattr(KVConnectorProm, _INSTALLED, False):
        return
    prom: Any = KVConnectorProm
    prom.__init__ = _with_metrics(prom.__init__)
    logging: Any = LoggingStatLogger
    logging.__init__ = _with_line(logging.__init__)
    setattr(KVConnectorProm, _INSTALLED, True)


def _with_metrics(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(
        self: Any,
        vllm_config: VllmConfig,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(self, vllm_config, labelnames, per_engine_labelvalues, *args, **kwargs)
        if engine_policy(vllm_config) is None:
            return
        from prometheus_client import Counter, Gauge, Histogram

        from pyramid_vllm.metrics.prometheus import PolicyMetrics

        # On Ray these are Ray's metrics.
        types = {
            Counter: self._counter_cls,
            Gauge: self._gauge_cls,
            Histogram: self._histogram_cls,
        }
        self.prom_metrics = PolicyMetrics(
            vllm_config, types, labelnames, per_engine_labelvalues
        )

    return init


def _with_line(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        policy = engine_policy(vllm_config)
        if policy is None:
            return
        from pyramid_vllm.metrics.log_line import PolicyLogging

        self.kv_connector_logging = PolicyLogging(policy.name)

    return init
