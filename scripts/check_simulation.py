"""Predicted against measured ratios of `pyramid` to stock vLLM, on this machine.

One bench is there for the fit of the device's efficiencies. Three others, of loads that
the fit has not seen, are measured and predicted.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.simulate.calibrate import MeasuredRun, fit, read_runs
from pyramid_vllm.tools.simulate.device import Device, load_device
from pyramid_vllm.tools.simulate.figures import run_figures

POLICY = "pyramid"


@dataclass(frozen=True)
class Bench:
    """One call of ``pyramid-vllm bench``."""

    name: str
    label: str
    options: str


FIT = Bench(
    "fit",
    "the fit: 12 x (640 + 96), memory of 3 and of 12 sequences",
    "--num-prompts 12 --prompt-tokens 640 --output-tokens 96 --kv-memory 3x "
    "--kv-memory 12x",
)
UNSEEN = (
    Bench(
        "binds",
        "unshared, memory binds: 24 x (1,024 + 128), 4 sequences",
        "--num-prompts 24 --prompt-tokens 1024 --output-tokens 128 --kv-memory 4x",
    ),
    Bench(
        "free",
        "unshared, memory does not bind: 8 x (768 + 128), 16 sequences",
        "--num-prompts 8 --prompt-tokens 768 --output-tokens 128 --kv-memory 16x",
    ),
    Bench(
        "shared",
        "one shared prefix: 12 x (1,024 shared + 96 + 64), 3 sequences",
        "--num-prompts 12 --shared-prefix 1024 --prompt-tokens 96 --output-tokens 64 "
        "--kv-memory 3x",
    ),
)


def run_bench(bench: Bench, model: str, out: Path, repeats: int) -> Path:
    """Run a bench, without the runs that are finished; returns its folder."""
    folder = out / bench.name
    command = [str(Path(sys.executable).with_name("pyramid-vllm")), "bench"]
    command += ["--model", model, "--kv-policy", POLICY, "--repeats", str(repeats)]
    subprocess.run([*command, *bench.options.split(), "--out", str(folder)], check=True)
    return folder


def tokens_per_s(runs: list[MeasuredRun], device: Device) -> dict[str, float]:
    """Predicted tokens/s by side, of the side's first run."""
    found: dict[str, float] = {}
    for run in runs:
        if run.side not in found:
            found[run.side] = run_figures(run.repeated(device))["tokens_per_s"]
    return found


def compare(bench: Bench, folder: Path, model: str, device: Device) -> dict[str, Any]:
    """Measured and predicted figures of one load."""
    predicted = tokens_per_s(read_runs(folder, model, device), device)
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (point,) = content["points"]
    measured = {
        side: point["sides"][side]["total_tokens_per_s"]["median"]
        for side in (NONE, POLICY)
    }
    ratios = [side[POLICY] / side[NONE] for side in (measured, predicted)]
    return {
        "load": bench.label,
        "measured": measured,
        "predicted": predicted,
        "measured_ratio": ratios[0],
        "predicted_ratio": ratios[1],
        "error": ratios[1] / ratios[0] - 1,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Tokens/s of both sides and the ratios, for people."""
    columns = ("load", "measured", "predicted", "ratios", "error")
    found = Table(
        *columns, title="Tokens/s of stock vLLM and `pyramid`, and their ratio"
    )
    for row in rows:
        pairs = (
            f"{row[side][NONE]:.0f}, {row[side][POLICY]:.0f}"
            for side in ("measured", "predicted")
        )
        ratios = f"{row['measured_ratio']:.2f}, {row['predicted_ratio']:.2f}"
        found.add_row(row["load"], *pairs, ratios, f"{row['error']:+.0%}")
    return found


def main(
    out: Annotated[
        Path, typer.Option(help="Folder of results; finished runs are not repeated.")
    ] = Path("simulation-results"),
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Measure, fit, predict, and print both side by side."""
    model = str(make_model())
    device = load_device("cpu")
    folder = run_bench(FIT, model, out, repeats)
    fitted, error = fit(read_runs(folder, model, device), device)
    rows = [
        compare(bench, run_bench(bench, model, out, repeats), model, fitted)
        for bench in UNSEEN
    ]
    console = Console()
    console.print(f"{FIT.label}; typical error of requests' times {error:.1%}")
    console.print(fitted.efficiency.model_dump())
    console.print(table(rows))
    if json_file is not None:
        content = {"rows": rows, "fit_error": error}
        content["efficiency"] = fitted.efficiency.model_dump()
        write_report(json_file, content, 0)


if __name__ == "__main__":
    typer.run(main)
