"""Devices: the peaks of data sheets, and which share of them is reached."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from pyramid_vllm.policy.presets import config_dir
from pyramid_vllm.tools.simulate.model import ModelWork

#: vLLM's default of ``gpu_memory_utilization``, and the memory for activations, graphs
#: and buffers: roughly what its profiling finds.
_UTILIZATION, _ACTIVATION_BYTES = 0.92, 4e9

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Efficiency(BaseModel):
    """Shares of a device's peaks that are reached, and times that are always there.

    Round figures between what kernels reach in isolation and what engines do; they
    are settings, since no two versions of a kernel agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bandwidth: Share = 0.8
    """Share of the memory's bandwidth at which weights, keys and values are read."""
    flops: Share = 0.6
    """Share of the peak in the matrices of layers and of the logits."""
    attention_flops: Share = 0.5
    """Share of the peak in a prompt's attention."""
    score_flops: Share = 0.3
    """Share of the peak when a policy scores tokens."""
    move_bandwidth: Share = 0.5
    """Share of the memory's bandwidth when a policy selects and compacts."""
    link: Share = 0.7
    """Share of the bandwidth of links between devices."""
    step_ms: float = Field(default=0.5, ge=0)
    """Time of every step: launches, sampling, what is not modelled."""
    sequence_us: float = Field(default=0.0, ge=0)
    """Time of every sequence in a step."""
    compaction_us: float = Field(default=0.0, ge=0)
    """Time of every layer that compacts a sequence."""
    all_reduce_us: float = Field(default=10.0, ge=0)
    """Latency of one all-reduce."""


class Device(BaseModel):
    """A device that an engine runs on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_gb: Positive
    """Memory in 10^9 bytes."""
    bandwidth_gb_s: Positive
    """Bandwidth of its memory, in 10^9 bytes a second."""
    tflops: Mapping[str, Positive]
    """Peak of dense matrix products, in 10^12 FLOPs a second, by dtype."""
    link_gb_s: Positive
    """Bandwidth to the other devices, one direction, in 10^9 bytes a second."""
    block_size: PositiveInt = 16
    """vLLM's default number of tokens of a page."""
    async_scheduling: bool = True
    """Whether vLLM schedules a step while the one before it runs."""
    efficiency: Efficiency = Efficiency()

    def changed(self, settings: Mapping[str, Any]) -> "Device":
        """The same with other efficiencies; ``ValueError`` names one that is not
        valid."""
        efficiency = self.efficiency.model_dump() | dict(settings)
        return Device.model_validate(self.model_dump() | {"efficiency": efficiency})

    def check_dtype(self, dtype: str) -> None:
        """Refuse a dtype for which the device has no peak."""
        if dtype not in self.tflops:
            raise ValueError(
                f"--dtype is '{dtype}': valid on --gpu {self.name} are "
                f"{', '.join(self.tflops)}"
            )

    def default_kv_bytes(self, model: ModelWork) -> int:
        """KV memory that vLLM would find; ``ValueError`` if the weights leave none."""
        weights = model.weight_bytes / model.tensor_parallel
        left = self.memory_gb * 1e9 * _UTILIZATION - weights - _ACTIVATION_BYTES
        if left <= 0:
            raise ValueError(
                f"MODEL is '{model.name}': {weights / 1e9:.1f} GB of weights a device "
                f"do not fit beside activations into --gpu {self.name}, "
                f"{self.memory_gb:g} GB; valid are a larger --tensor-parallel or "
                "another --gpu"
            )
        return int(left)

    @property
    def default_batch(self) -> tuple[int, int]:
        """vLLM's default ``max_num_seqs`` and ``max_num_batched_tokens`` of a server
        (``EngineArgs.get_batch_defaults``, 0.32)."""
        if self.name == "cpu":
            return 128, 2048
        gib = self.memory_gb * 1e9 / 2**30
        if gib >= 160:
            return 1024, 16384
        return (1024, 8192) if gib >= 70 and "a100" not in self.name else (256, 2048)


def device_names() -> list[str]:
    """Names of the shipped devices, sorted."""
    return sorted(path.stem for path in config_dir("gpus").glob("*.yaml"))


def load_device(name: str) -> Device:
    """A shipped device, or the one of a YAML file; ``ValueError`` if there is none, or
    its file is not valid."""
    is_file = name.endswith((".yaml", ".yml"))
    file = Path(name) if is_file else config_dir("gpus") / f"{name.lower()}.yaml"
    try:
        return Device.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(
            f"--gpu is '{name}': valid are {', '.join(device_names())}, and the path "
            "of a YAML file"
        ) from None
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"--gpu is '{name}': {detail}") from None
