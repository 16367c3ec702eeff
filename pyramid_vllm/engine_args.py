"""Policy arguments on vLLM's command line and on ``LLM``.

Cause: vLLM has no registry for engine arguments, or for plugins that choose the
scheduler and worker classes. Removal: once it has, see ``patches/``. Without a policy
every wrapper calls vLLM's function unchanged.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from pyramid_vllm import request_args
from pyramid_vllm.checks import check_engine
from pyramid_vllm.compat import check_vllm_version
from pyramid_vllm.metrics import install as metrics
from pyramid_vllm.metrics.config import MarkedConfig
from pyramid_vllm.policy import KVPolicyError, PolicyConfig, preset_names
from pyramid_vllm.spec import OVERRIDES_KEY, POLICY_KEY, configured_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger(f"vllm.{__name__}")

SCHEDULER_CLS = "pyramid_vllm.scheduler.PyramidScheduler"
#: By vLLM's device; ``check_engine`` refuses other devices.
WORKER_CLS = {
    "cpu": "pyramid_vllm.worker.PyramidCPUWorker",
    "cuda": "pyramid_vllm.worker.PyramidGPUWorker",
}
_INSTALLED = "_pyramid_vllm_installed"


def install() -> None:
    """Wrap vLLM's engine arguments. Idempotent."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    if getattr(EngineArgs, _INSTALLED, False):
        return
    for cls in (EngineArgs, AsyncEngineArgs):
        cls.__init__ = _with_policy_arguments(cls.__init__)
    EngineArgs.add_cli_args = staticmethod(_with_policy_flags(EngineArgs.add_cli_args))
    EngineArgs.from_cli_args = classmethod(
        _with_policy_namespace(EngineArgs.from_cli_args.__func__)
    )
    EngineArgs.create_engine_config = _with_policy_classes(
        EngineArgs.create_engine_config
    )
    setattr(EngineArgs, _INSTALLED, True)


def _merged(additional_config: Any, policy: Any, overrides: Any) -> Any:
    """``additional_config`` with the policy's arguments."""
    if policy is None and overrides is None:
        return additional_config
    if not isinstance(additional_config, dict):
        raise KVPolicyError(
            f"kv_policy needs additional_config to be a dict: "
            f"it is {type(additional_config).__name__}"
        )
    merged = dict(additional_config)
    for key, value in ((POLICY_KEY, policy), (OVERRIDES_KEY, overrides)):
        if value is None:
            continue
        if merged.get(key) not in (None, value):
            raise KVPolicyError(
                f"{key} is {value!r}, but additional_config says {merged[key]!r}: "
                "give it once"
            )
        merged[key] = value
    return merged


def _with_policy_arguments(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(
        self: EngineArgs,
        *args: Any,
        kv_policy: Any = None,
        kv_policy_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if kv_policy is not None or kv_policy_config is not None:
            given = kwargs.get("additional_config") or {}
            merged = _merged(given, kv_policy, kv_policy_config)
            kwargs["additional_config"] = merged
        original(self, *args, **kwargs)

    return init


def _with_policy_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        group = parser.add_argument_group(
            title="KVPolicy",
            description="Which tokens each layer keeps in the KV cache (pyramid-vllm).",
        )
        group.add_argument(
            "--kv-policy",
            default=None,
            metavar="POLICY",
            help=f"A preset ({', '.join(preset_names())}), the path of a YAML file, "
            "or inline JSON.",
        )
        group.add_argument(
            "--kv-policy-config",
            default=None,
            metavar="JSON",
            help='Settings that replace the policy\'s, as JSON: {"retention": 0.7}.',
        )
        return parser

    return add_cli_args


def _with_policy_namespace(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        policy = getattr(args, "kv_policy", None)
        overrides = getattr(args, "kv_policy_config", None)
        if policy is not None or overrides is not None:
            args = argparse.Namespace(**vars(args))
            given = getattr(args, "additional_config", None) or {}
            args.additional_config = _merged(given, policy, overrides)
        return original(cls, args)

    return from_cli_args


def _with_policy_classes(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        # Installed late: plugins load while vLLM is only partly imported.
        request_args.install()
        metrics.install()
        policy = configured_policy(self.additional_config)
        if policy is None:
            return original(self, *args, **kwargs)
        check_vllm_version()
        _choose_class(self, "scheduler_cls", SCHEDULER_CLS, unset=(None,))
        _choose_class(self, "worker_cls", _worker_cls(), unset=("auto",))
        _switch_prefix_caching_off(self, policy)
        # Resolved to settings: a file may be missing on other nodes.
        self.additional_config = {
            key: value
            for key, value in self.additional_config.items()
            if key != OVERRIDES_KEY
        } | {POLICY_KEY: policy.model_dump()}
        config = original(self, *args, **kwargs)
        check_engine(config)
        config.additional_config = MarkedConfig(config.additional_config)
        return config

    return create_engine_config


def _worker_cls() -> str:
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if device not in WORKER_CLS:
        valid = ", ".join(repr(name) for name in WORKER_CLS)
        raise KVPolicyError(
            f"kv_policy does not support device={device!r}: valid are {valid}"
        )
    return WORKER_CLS[device]


def _choose_class(
    args: EngineArgs, name: str, ours: str, unset: tuple[str | None, ...]
) -> None:
    given = getattr(args, name)
    if given in unset:
        setattr(args, name, ours)
    elif given != ours:
        raise KVPolicyError(f"kv_policy needs {name}='{ours}': it is {given!r}")


def _switch_prefix_caching_off(args: EngineArgs, policy: PolicyConfig) -> None:
    if args.enable_prefix_caching is False:
        return
    if policy.prune_from is not None:
        reason = "prunes prompts: later layers do not compute every row"
    elif policy.evict == "chunk":
        reason = "evicts after every chunk: later pages depend on the eviction"
    else:
        return
    log = logger.warning if args.enable_prefix_caching else logger.info
    log("KV policy %s: prefix caching is switched off: it %s", policy.name, reason)
    args.enable_prefix_caching = False
