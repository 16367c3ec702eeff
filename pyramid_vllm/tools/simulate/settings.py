"""What the command's options mean."""

from dataclasses import dataclass
from typing import Any

from pyramid_vllm.policy import NONE, PolicyConfig, resolve_policy
from pyramid_vllm.tools.simulate.device import Device
from pyramid_vllm.tools.simulate.engine import EngineSettings
from pyramid_vllm.tools.simulate.loads import Load
from pyramid_vllm.tools.simulate.model import ModelWork
from pyramid_vllm.tools.simulate.run import RunOptions
from pyramid_vllm.tools.simulate.slo import Objective

#: vLLM's default of ``gpu_memory_utilization``, and what of it is left for
#: activations, graphs and buffers: a round figure of what its profiling finds.
_UTILIZATION, _ACTIVATION_BYTES = 0.92, 4e9


@dataclass(frozen=True)
class SimulateSettings:
    """One simulation of several sides."""

    engine: EngineSettings
    device: Device
    load: Load
    sides: tuple[tuple[str, PolicyConfig | None], ...]
    options: RunOptions
    objective: Objective | None
    seed: int

    def describe(self) -> dict[str, Any]:
        """As JSON can hold it."""
        engine = self.engine
        return {
            "model": engine.model.name,
            "dtype": engine.model.dtype,
            "tensor_parallel": engine.model.tensor_parallel,
            "kv_bytes": engine.kv_bytes,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.max_num_seqs,
            "max_num_batched_tokens": engine.max_num_batched_tokens,
            "block_size": engine.block_size,
            "prefix_caching": engine.prefix_caching,
            "async_scheduling": engine.async_scheduling,
            "device": self.device.model_dump(),
            "load": self.load.name,
            "num_sessions": len(self.load.sessions),
            "num_clients": self.load.num_clients,
            "rate": self.load.rate,
            "cpu_time": self.options.cpu_time,
            "cascade": self.options.cascade,
            "policies": {
                name: None if policy is None else policy.model_dump()
                for name, policy in self.sides
            },
        }


def parse_policies(
    policies: list[str], overrides: str | None
) -> tuple[tuple[str, PolicyConfig | None], ...]:
    """Stock vLLM, then the policies under names of their own.

    Raises:
        KVPolicyError: a policy is not valid.
    """
    sides: list[tuple[str, PolicyConfig | None]] = [(NONE, None)]
    for text in policies:
        policy = None if text == NONE else resolve_policy(text, overrides)
        if policy is None or policy in [of for _, of in sides]:
            continue
        alike = sum(of is not None and of.name == policy.name for _, of in sides)
        name = f"{policy.name} ({alike + 1})" if alike else policy.name
        sides.append((name, policy))
    return tuple(sides)


def default_kv_bytes(model: ModelWork, device: Device) -> int:
    """KV memory that vLLM would find on a device.

    Raises:
        ValueError: the weights leave no memory for the KV cache.
    """
    weights = model.weight_bytes / model.tensor_parallel
    left = device.memory_gb * 1e9 * _UTILIZATION - weights - _ACTIVATION_BYTES
    if left <= 0:
        raise ValueError(
            f"MODEL is '{model.name}': {weights / 1e9:.1f} GB of weights a device do "
            f"not fit beside activations into --gpu {device.name}, "
            f"{device.memory_gb:g} GB; valid are a larger --tensor-parallel or another "
            "--gpu"
        )
    return int(left)


def default_batch(device: Device) -> tuple[int, int]:
    """vLLM's default ``max_num_seqs`` and ``max_num_batched_tokens`` of a server
    (``EngineArgs.get_batch_defaults``, 0.32)."""
    if device.name == "cpu":
        return 128, 2048
    gib = device.memory_gb * 1e9 / 2**30
    if gib >= 160:
        return 1024, 16384
    return (1024, 8192) if gib >= 70 and "a100" not in device.name else (256, 2048)
