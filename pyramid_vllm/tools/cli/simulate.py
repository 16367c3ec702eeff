"""Options of ``pyramid-vllm simulate``."""

import os
from typing import Any

from pyramid_vllm.tools.cli import simulate_options as of
from pyramid_vllm.tools.cli.failing import or_fail


def simulate(
    model: of.Model,
    kv_policy: of.Policies = None,
    kv_policy_config: of.Overrides = None,
    gpu: of.Gpu = "h100",
    efficiency: of.Efficiency = None,
    tensor_parallel: of.TensorParallel = 1,
    kv_memory: of.KVMemory = None,
    dtype: of.Dtype = None,
    max_model_len: of.MaxModelLen = None,
    max_num_seqs: of.DeviceDefault = None,
    max_num_batched_tokens: of.DeviceDefault = None,
    block_size: of.DeviceDefault = None,
    prefix_caching: of.PrefixCaching = True,
    load: of.LoadName = "unshared",
    num_requests: of.NumRequests = None,
    prompt_tokens: of.PromptTokens = None,
    output_tokens: of.OutputTokens = None,
    shared_prefix: of.SharedPrefix = None,
    num_prefixes: of.NumPrefixes = None,
    turns: of.Turns = None,
    think_time: of.ThinkTime = None,
    spread: of.Spread = None,
    rate: of.Rate = None,
    clients: of.Clients = None,
    trace: of.Trace = None,
    trace_speed: of.TraceSpeed = 1.0,
    cascade: of.Cascade = False,
    cpu_time: of.CpuTime = True,
    slo_ttft: of.SloTtft = None,
    slo_tpot: of.SloTpot = None,
    seed: of.Seed = 0,
    calibrate: of.Calibrate = None,
    json_file: of.JsonFile = None,
    plots: of.Plots = None,
) -> None:
    """Compare policies with stock vLLM on a modelled device, under real schedulers."""
    options = dict(locals())
    or_fail(lambda: _run(options))


def _run(options: dict[str, Any]) -> None:
    # vLLM says on import what its own device lacks; the simulated one is another.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if options["plots"] is not None:
        from pyramid_vllm.tools.plotting import check_matplotlib

        check_matplotlib()
    from pyramid_vllm.tools.simulate.options import make_settings

    if options["calibrate"] is not None:
        from pyramid_vllm.tools.simulate.calibrate import run_calibration

        run_calibration(options["model"], options["gpu"], options["calibrate"])
        return
    from pyramid_vllm.compat import check_vllm_version
    from pyramid_vllm.tools.simulate.report import run_simulation

    settings = make_settings(options)
    check_vllm_version()
    run_simulation(settings, options["json_file"], options["plots"])
