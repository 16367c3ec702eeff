"""Efficiencies of a device, fitted to runs of ``pyramid-vllm bench``.

With all requests there from the start and one step at a time, what is scheduled does
not depend on how long steps last. So each run is simulated once, and its steps' work
is kept; then the times at which requests got their first and last tokens are a
function of the efficiencies, which least squares fit to the measured ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from pyramid_vllm.policy import NONE, resolve_policy
from pyramid_vllm.tools.simulate.clock import StepWork, step_seconds
from pyramid_vllm.tools.simulate.device import Device, load_device
from pyramid_vllm.tools.simulate.engine import EngineSettings, SimulatedEngine
from pyramid_vllm.tools.simulate.loads import Load, Piece, Session, Turn
from pyramid_vllm.tools.simulate.model import ModelWork, load_model
from pyramid_vllm.tools.simulate.run import Simulation

Floats = npt.NDArray[np.float64]

#: Fitted settings of ``Efficiency``, and where the search for each starts. Links
#: have no effect on one device.
_STARTS = {
    "bandwidth": 0.3,
    "flops": 0.3,
    "attention_flops": 0.1,
    "score_flops": 0.1,
    "move_bandwidth": 0.1,
    "step_ms": 5.0,
    "sequence_us": 300.0,
    "compaction_us": 100.0,
}
#: Weight of a setting's distance from its start, relative to one measured time: a
#: setting that the runs do not depend on stays at its start.
_PRIOR = 0.05


@dataclass(frozen=True)
class MeasuredRun:
    """One run of a bench, and what the simulation needs to repeat it."""

    side: str
    engine: SimulatedEngine
    load: Load
    first_token_s: list[float]
    finish_s: list[float]

    def repeated(self, device: Device, keep_works: bool = False) -> Simulation:
        """Simulate it on a device. What the scheduler takes on this machine is part of
        the measured times, so it does not count."""
        timing = False, False, keep_works
        return Simulation(self.side, self.engine, device, self.load, *timing).run()


def read_runs(folder: Path, model: str, device: Device) -> list[MeasuredRun]:
    """The runs of a bench's ``results.json``; ``ValueError`` if they cannot be
    repeated."""
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    settings = content["settings"]
    if settings["turns"] != 1:
        raise ValueError(
            f"--calibrate {folder} was run with turns={settings['turns']}: valid is 1, "
            "where every request is there from the start"
        )
    dtype = settings["dtype"] or ("float32" if device.name == "cpu" else None)
    work = load_model(model, dtype, 1)
    device.check_dtype(work.dtype)
    return [_measured(run, settings, work, device) for run in content["runs"]]


def _measured(
    run: dict[str, Any], settings: dict[str, Any], work: ModelWork, device: Device
) -> MeasuredRun:
    raw, args = run["raw"], settings["engine_args"]
    lengths = list(zip(raw["prompt_lengths"], raw["output_lengths"], strict=True))
    shared, num_prefixes = settings["shared_prefix"], settings["num_prefixes"]
    sessions = []
    for index, (prompt, outputs) in enumerate(lengths):
        # One of the shared prefixes, then tokens of its own.
        pieces: tuple[Piece, ...] = ((1_000_000 + index, prompt - shared),)
        if shared:
            pieces = ((index % num_prefixes, shared), *pieces)
        sessions.append(Session((Turn(pieces, outputs),)))
    policy = resolve_policy(settings["sides"][run["side"]])
    engine = EngineSettings(
        model=work,
        kv_bytes=run["point"]["kv_bytes"],
        max_model_len=max(map(sum, lengths)),
        max_num_seqs=settings["max_num_seqs"],
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        block_size=args.get("block_size") or device.block_size,
        prefix_caching=args.get("enable_prefix_caching", True),
        async_scheduling=device.async_scheduling,
    )
    return MeasuredRun(
        side=run["side"],
        engine=SimulatedEngine(engine, policy),
        load=Load("measured", tuple(sessions)),
        first_token_s=raw["first_token_s"],
        finish_s=raw["finish_s"],
    )


def _errors_of(run: MeasuredRun, device: Device) -> Callable[[Device], Floats]:
    """Simulate a run; the logarithms of predicted over measured times of first and of
    last tokens, as a function of the efficiencies."""
    done = run.repeated(device, keep_works=True)
    works = StepWork(*np.array([astuple(work) for work in done.works]).T)
    records = [done.requests[f"{index}.0"] for index in range(len(run.finish_s))]
    times = [*(r.first_token for r in records), *(r.finish for r in records)]
    steps = np.searchsorted([step.end for step in done.steps], times)
    measured = np.array([*run.first_token_s, *run.finish_s])

    def errors(device: Device) -> Floats:
        ends = np.cumsum(step_seconds(works, run.engine.settings.model, device))
        found: Floats = np.log(ends[steps] / measured)
        return found

    return errors


def fit(runs: list[MeasuredRun], device: Device) -> tuple[Device, float]:
    """Fit the device's efficiencies.

    Returns:
        The device with the fitted ones, and the typical error: the root of the mean
        squared logarithm of predicted over measured times.
    """
    from scipy.optimize import least_squares

    errors_of = [_errors_of(run, device) for run in runs]
    names = list(_STARTS)
    start = np.log([_STARTS[name] for name in names])

    def with_values(values: Floats) -> Device:
        found = dict(zip(names, np.exp(values).tolist(), strict=True))
        return device.changed(found)

    def residuals(values: Floats) -> Floats:
        changed = with_values(values)
        errors = [of_run(changed) for of_run in errors_of]
        return np.concatenate([*errors, _PRIOR * (values - start)])

    # Times, in ms and us, have no bound; shares are at most 1.
    upper = [np.inf if name.endswith(("_ms", "_us")) else 0.0 for name in names]
    best = least_squares(residuals, start, bounds=(-np.inf, upper))
    errors = residuals(best.x)[: -len(names)]
    return with_values(best.x), float(np.sqrt(np.mean(errors**2)))


def run_calibration(model: str, gpu: str, folder: Path) -> None:
    """Fit, and print the efficiencies as a device file has them.

    Raises:
        ValueError: the folder's runs cannot be repeated.
        RuntimeError: SciPy is missing.
    """
    if find_spec("scipy") is None:
        raise RuntimeError(
            "--calibrate needs SciPy, which is not installed: "
            "pip install 'pyramid-vllm[calibrate]'"
        )
    device = load_device(gpu)
    runs = read_runs(folder, model, device)
    fitted, error = fit(runs, device)
    changed = {
        name: float(f"{value:.3g}")
        for name, value in fitted.efficiency.model_dump().items()
        if name in _STARTS
    }
    policies = ", ".join(sorted({run.side for run in runs} - {NONE}))
    print(
        f"# Fitted to {len(runs)} runs of {policies} and stock vLLM; typical error of "
        f"requests' times {error:.1%}."
    )
    print(yaml.safe_dump({"efficiency": changed}, sort_keys=False), end="")
