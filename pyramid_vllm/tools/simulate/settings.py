"""The options of ``pyramid-vllm simulate``."""

from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from pyramid_vllm.tools import options
from pyramid_vllm.tools.figures import Figures
from pyramid_vllm.tools.json_settings import json_object
from pyramid_vllm.tools.options import argument, option, parsed
from pyramid_vllm.tools.sides import Side, parse_sides
from pyramid_vllm.tools.simulate.device import Device, load_device
from pyramid_vllm.tools.simulate.engine import EngineSettings
from pyramid_vllm.tools.simulate.loads import Load, LoadSettings, named_load
from pyramid_vllm.tools.simulate.model import load_model
from pyramid_vllm.tools.simulate.slo import check_arrivals
from pyramid_vllm.tools.simulate.trace import read_trace
from pyramid_vllm.tools.sizes import parse_bytes, parse_seconds

_DEVICE_DEFAULT = "Default: vLLM's for the device."
_memory = parsed(lambda text: text and parse_bytes(text))
_efficiency = parsed(lambda text: json_object("--efficiency", text))
_ttft = parsed(lambda text: text and parse_seconds("--slo-ttft", text))
_tpot = parsed(lambda text: text and parse_seconds("--slo-tpot", text))
_above_0 = Field(gt=0, allow_inf_nan=False)


@dataclass(frozen=True, config=options.SETTINGS_CONFIG)
class SimulateSettings:
    """Compare policies with stock vLLM on a modelled device, under real schedulers."""

    model: str = argument("A model's folder, a bundled shape's name or a hub name.")
    kv_policy: options.Texts = option(("pyramid",), options.POLICIES)
    kv_policy_config: str | None = option(
        None, "Settings that replace each policy's, as JSON."
    )
    gpu: str = option("h100", "A shipped device, or a YAML file's path.")
    efficiency: Annotated[dict[str, Any], _efficiency] = option(
        None, "Shares of the device's peaks, as JSON."
    )
    tensor_parallel: int = option(1, "Devices.", min=1)
    kv_memory: Annotated[int | None, _memory] = option(
        None,
        "KV memory of a device: bytes, or with KiB, MiB, GiB. Default: what the "
        "weights leave.",
    )
    dtype: str | None = option(None, "Of the KV cache too; default: the model's.")
    max_model_len: int | None = option(
        None, "Longest request; default: the model's.", min=1
    )
    max_num_seqs: int | None = option(None, _DEVICE_DEFAULT, min=1)
    max_num_batched_tokens: int | None = option(None, _DEVICE_DEFAULT, min=1)
    block_size: int | None = option(None, _DEVICE_DEFAULT, min=1)
    prefix_caching: bool = option(True, "As in vLLM.")
    load: str = option(
        "unshared",
        "unshared, shared (one prefix), documents (several), chat (turns that grow), "
        "agent (tens of turns), reasoning (short in, long out).",
    )
    num_requests: int | None = option(
        None,
        "Requests, or sessions of several turns; of a trace the first ones.",
        min=1,
    )
    prompt_tokens: int | None = option(None, "That each turn adds for itself.", min=1)
    output_tokens: int | None = option(None, "Of each answer.", min=1)
    shared_prefix: int | None = option(None, "Tokens that sessions start with.", min=0)
    num_prefixes: int | None = option(None, "Different prefixes.", min=1)
    turns: int | None = option(None, "Of a session.", min=1)
    think_time: float | None = option(
        None, "Mean seconds from an answer to the next turn.", min=0
    )
    spread: Annotated[float | None, Field(ge=0, lt=1)] = option(
        None, "Lengths vary by this share of theirs."
    )
    rate: Annotated[float | None, _above_0] = option(
        None, "Sessions a second, a Poisson process; default: all at once."
    )
    clients: int | None = option(None, "Sessions at once, in place of a rate.", min=1)
    trace: Path | None = option(
        None, "JSON lines in Mooncake's form, in place of --load."
    )
    trace_speed: Annotated[float, _above_0] = option(
        1.0, "Arrivals are this many times as fast."
    )
    cascade: bool = option(
        False, "Pages that sequences share are read once.", "--cascade"
    )
    cpu_time: bool = option(
        True,
        "Whether the scheduler's own time counts. Without it, results are the same on "
        "every machine.",
    )
    slo_ttft: Annotated[float | None, _ttft] = option(
        None, "Bound of the p99 time to first token, like 2s."
    )
    slo_tpot: Annotated[float | None, _tpot] = option(
        None, "Bound of the p99 time per output token, like 50ms."
    )
    seed: int = option(0, min=0)
    calibrate: Path | None = option(
        None,
        "Fit the device's efficiencies to the runs in this folder of "
        "`pyramid-vllm bench`, print them and stop.",
    )
    json_file: Path | None = option(None, options.JSON_FILE, "--json")
    plots: Path | None = option(None, "Draw a picture into this folder.")

    @cached_property
    def device(self) -> Device:
        """The device of an engine."""
        return load_device(self.gpu).changed(self.efficiency)

    @cached_property
    def sides(self) -> list[Side]:
        """Stock vLLM, then the policies."""
        return parse_sides(self.kv_policy, self.kv_policy_config)

    @cached_property
    def engine(self) -> EngineSettings:
        """The same for every side."""
        device = self.device
        model = load_model(self.model, self.dtype, self.tensor_parallel)
        device.check_dtype(model.dtype)
        max_num_seqs, max_tokens = device.default_batch
        max_num_seqs = self.max_num_seqs or max_num_seqs
        return EngineSettings(
            model=model,
            kv_bytes=self.kv_memory or device.default_kv_bytes(model),
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens
            or max(max_tokens, max_num_seqs),
            block_size=self.block_size or device.block_size,
            prefix_caching=self.prefix_caching,
            async_scheduling=device.async_scheduling,
        )

    @cached_property
    def traffic(self) -> Load:
        """The load of an engine: a named load, or a trace."""
        values = {of.name: getattr(self, of.name) for of in fields(LoadSettings)}
        changes = {name: value for name, value in values.items() if value is not None}
        if self.trace is None:
            return named_load(self.load, changes)
        of_named = changes.keys() - {"num_requests", "seed"}
        if of_named:
            given = ", ".join(f"{key}={changes[key]}" for key in sorted(of_named))
            raise ValueError(
                f"--trace {self.trace} brings lengths and arrivals: {given} is of "
                "named loads; valid with it are --num-requests and --trace-speed"
            )
        return read_trace(self.trace, self.num_requests).scaled(self.trace_speed)

    @cached_property
    def objective(self) -> Figures:
        """Bounds of latencies, as many as are asked for."""
        bounds = {"ttft_p99_s": self.slo_ttft, "tpot_p99_s": self.slo_tpot}
        found = {key: bound for key, bound in bounds.items() if bound is not None}
        if found:
            check_arrivals(self.traffic)
        return found

    def describe(self) -> dict[str, Any]:
        """The settings as reports carry them."""
        engine, load = vars(self.engine).copy(), self.traffic
        model = engine.pop("model")
        return {
            "model": model.name,
            "dtype": model.dtype,
            "tensor_parallel": model.tensor_parallel,
            **engine,
            "device": self.device.model_dump(),
            "load": load.name,
            "num_sessions": len(load.sessions),
            "num_clients": load.num_clients,
            "rate": load.rate,
            "cpu_time": self.cpu_time,
            "cascade": self.cascade,
            "policies": {
                side.name: side.policy and side.policy.model_dump()
                for side in self.sides
            },
        }
