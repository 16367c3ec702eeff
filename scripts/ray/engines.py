"""Settings that `batch.py` and `serve.py` give vLLM's engines, on CPUs and GPUs."""

import signal
from dataclasses import dataclass, field
from typing import Any

from pyramid_vllm.policy import resolve_policy
from pyramid_vllm.tools import options
from pyramid_vllm.tools.json_settings import json_object
from pyramid_vllm.tools.sizes import parse_bytes

#: Help of options that both scripts have.
POLICY = f"{options.POLICY} none: stock vLLM."
DEVICE = "What engines run on: cpu or gpu."
ENGINE_ARGS = "Further settings of vLLM's engine, as JSON."
ADDRESS = "A Ray cluster; default: one of this machine."


@dataclass(frozen=True)
class Device:
    """What a worker of an engine asks of Ray, and what vLLM's defaults lack."""

    bundle: dict[str, float]
    engine_kwargs: dict[str, Any] = field(default_factory=dict)


DEVICES = {
    "cpu": Device(
        {"CPU": 1},
        {
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": parse_bytes("1GiB"),
        },
    ),
    "gpu": Device({"CPU": 1, "GPU": 1}),
}


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in DEVICES:
        raise ValueError(f"--device is '{name}': valid are {', '.join(DEVICES)}")
    return DEVICES[name]


def engine_kwargs(
    device: Device, policy: str, policy_config: str | None, further: str | None
) -> dict[str, Any]:
    """Settings of vLLM's engine, the policy among them.

    The policy is resolved here: a file's path may mean nothing on another node.

    Raises:
        ValueError: the policy or a setting is not valid.
    """
    settings = device.engine_kwargs | json_object("--engine-args", further)
    resolved = resolve_policy(policy, policy_config)
    if resolved is None:
        return settings
    given = settings.get("additional_config", {})
    if "kv_policy" in settings or "kv_policy" in given:
        raise ValueError("--engine-args has 'kv_policy': valid is --kv-policy")
    return settings | {
        "additional_config": given | {"kv_policy": resolved.model_dump()}
    }


def start_ray(address: str | None) -> None:
    """Join a cluster, or start one of this machine whose node is on loopback."""
    import ray

    if address is not None:
        ray.init(address=address)
    else:
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1")
    # SIGTERM acts like Ctrl-C, so that engines are ended. Ray's own handler aborts.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
