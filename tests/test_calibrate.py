"""``pyramid-vllm simulate --calibrate``: a device is fitted to measured runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pyramid_vllm.policy import resolve_policy
from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.simulate.calibrate import fit, read_runs
from pyramid_vllm.tools.simulate.device import Device, load_device

MODEL = "SmolLM2-135M"
CPU = load_device("cpu")
#: What the measured device is like: slower than where the fit starts, and otherwise so.
TRUE = {"flops": 0.11, "bandwidth": 0.2, "step_ms": 9.0, "sequence_us": 900.0}
LENGTHS = [(700, 40), (500, 60), (900, 20), (640, 48), (800, 30), (400, 64)]


def results(folder: Path, **changes: Any) -> Path:
    """A folder as ``pyramid-vllm bench`` writes it; the runs have no times."""
    policy = resolve_policy("pyramid")
    assert policy is not None
    kv_bytes = 90 * 32 * 2 * 3 * 64 * 4 * 30
    raw = {
        "prompt_lengths": [prompt for prompt, _ in LENGTHS],
        "output_lengths": [outputs for _, outputs in LENGTHS],
        "first_token_s": [1.0] * len(LENGTHS),
        "finish_s": [2.0] * len(LENGTHS),
    }
    settings = {
        "dtype": None,
        "shared_prefix": 0,
        "num_prefixes": 1,
        "turns": 1,
        "sides": {"none": None, "pyramid": json.dumps(policy.model_dump())},
        "engine_args": {},
        "max_num_seqs": 16,
        "max_num_batched_tokens": 1024,
    }
    runs = [
        {"side": side, "point": {"kv_bytes": kv_bytes}, "raw": dict(raw)}
        for side in ("none", "pyramid")
    ]
    content = {"settings": settings | changes, "runs": runs}
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def measure(folder: Path, device: Device) -> None:
    """Write the times that a device would have taken."""
    file = folder / "results.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for run, of_run in zip(
        content["runs"], read_runs(folder, MODEL, device), strict=True
    ):
        done = of_run.repeated(device)
        requests = [done.requests[f"{i}.0"] for i in range(len(LENGTHS))]
        run["raw"]["first_token_s"] = [request.first_token for request in requests]
        run["raw"]["finish_s"] = [request.finish for request in requests]
    file.write_text(json.dumps(content), encoding="utf-8")


def test_a_fit_finds_the_times_of_another_device(tmp_path: Path) -> None:
    folder = results(tmp_path / "bench")
    measure(folder, CPU.changed(TRUE))
    runs = read_runs(folder, MODEL, CPU)
    fitted, error = fit(runs, CPU)
    assert error < 0.03
    assert fitted.efficiency.flops == pytest.approx(TRUE["flops"], rel=0.3)
    # The same load on a device that nothing was fitted to is far off.
    run = runs[0]
    ends = []
    for device in (fitted, CPU.changed({"flops": 0.9})):
        done = run.repeated(device)
        ends.append(max(request.finish for request in done.requests.values()))
    measured = max(run.finish_s)
    assert abs(np.log(ends[0] / measured)) < 0.05
    assert abs(np.log(ends[1] / measured)) > 0.2


def test_the_command_prints_a_device_files_efficiencies(tmp_path: Path) -> None:
    folder = results(tmp_path / "bench")
    measure(folder, CPU.changed(TRUE))
    arguments = ["simulate", MODEL, "--gpu", "cpu", "--calibrate", str(folder)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "efficiency:" in result.output
    assert "flops:" in result.output


def test_runs_that_cannot_be_repeated_are_refused(tmp_path: Path) -> None:
    folder = results(tmp_path / "bench", turns=3)
    with pytest.raises(ValueError, match="turns=3: valid is 1"):
        read_runs(folder, MODEL, CPU)
