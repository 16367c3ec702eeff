"""From the command's options to settings; nothing here loads vLLM."""

from collections.abc import Mapping
from typing import Any

from pyramid_vllm.tools.json_settings import json_object
from pyramid_vllm.tools.simulate.device import Device, load_device
from pyramid_vllm.tools.simulate.engine import EngineSettings
from pyramid_vllm.tools.simulate.loads import Load, named_load, read_trace
from pyramid_vllm.tools.simulate.model import load_model
from pyramid_vllm.tools.simulate.run import RunOptions
from pyramid_vllm.tools.simulate.settings import (
    SimulateSettings,
    default_batch,
    default_kv_bytes,
    parse_policies,
)
from pyramid_vllm.tools.simulate.slo import Objective, check_arrivals, parse_seconds
from pyramid_vllm.tools.sizes import parse_bytes

#: Options of a named load, by the names of its settings.
_LOAD_OPTIONS = {
    "num_requests": "num_sessions",
    "prompt_tokens": "prompt_tokens",
    "output_tokens": "output_tokens",
    "shared_prefix": "shared_prefix",
    "num_prefixes": "num_prefixes",
    "turns": "turns",
    "think_time": "think_s",
    "spread": "spread",
    "rate": "rate",
    "clients": "clients",
}


def make_settings(options: Mapping[str, Any]) -> SimulateSettings:
    """Check what the command was given.

    Raises:
        ValueError: an option is not valid; names it, its value and what is.
        OSError: the trace cannot be read.
    """
    device = load_device(options["gpu"])
    device = device.changed(json_object("--efficiency", options["efficiency"]))
    load = _load(options)
    sides = parse_policies(
        options["kv_policy"] or ["pyramid"], options["kv_policy_config"]
    )
    return SimulateSettings(
        engine=_engine(options, device),
        device=device,
        load=load,
        sides=sides,
        options=RunOptions(options["cpu_time"], options["cascade"]),
        objective=_objective(options, load),
        seed=options["seed"],
    )


def _engine(options: Mapping[str, Any], device: Device) -> EngineSettings:
    model = load_model(options["model"], options["dtype"], options["tensor_parallel"])
    if model.dtype not in device.tflops:
        raise ValueError(
            f"--dtype is '{model.dtype}': valid on --gpu {device.name} are "
            f"{', '.join(device.tflops)}"
        )
    max_num_seqs, max_tokens = default_batch(device)
    max_num_seqs = options["max_num_seqs"] or max_num_seqs
    memory = options["kv_memory"]
    return EngineSettings(
        model=model,
        kv_bytes=default_kv_bytes(model, device)
        if memory is None
        else parse_bytes(memory),
        max_model_len=options["max_model_len"],
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=options["max_num_batched_tokens"]
        or max(max_tokens, max_num_seqs),
        block_size=options["block_size"] or device.block_size,
        prefix_caching=options["prefix_caching"],
        async_scheduling=device.async_scheduling,
    )


def _load(options: Mapping[str, Any]) -> Load:
    changes = {
        setting: options[option]
        for option, setting in _LOAD_OPTIONS.items()
        if options[option] is not None
    }
    if options["trace"] is None:
        return named_load(options["load"], changes | {"seed": options["seed"]})
    limit = changes.pop("num_sessions", None)
    if changes:
        given = ", ".join(f"{key}={value}" for key, value in changes.items())
        raise ValueError(
            f"--trace {options['trace']} brings lengths and arrivals: {given} is of "
            "named loads; valid with it are --num-requests and --trace-speed"
        )
    if not options["trace_speed"] > 0:
        raise ValueError(
            f"--trace-speed is {options['trace_speed']:g}: valid is above 0"
        )
    return read_trace(options["trace"], limit, options["trace_speed"])


def _objective(options: Mapping[str, Any], load: Load) -> Objective | None:
    ttft, tpot = (
        None
        if options[key] is None
        else parse_seconds(f"--{key.replace('_', '-')}", options[key])
        for key in ("slo_ttft", "slo_tpot")
    )
    if ttft is None and tpot is None:
        return None
    check_arrivals(load)
    return Objective(ttft, tpot)
