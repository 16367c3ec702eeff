"""Make the figures of docs/results.md and docs/results.json.

Each step is a command that anybody can run by itself; all keep what is finished,
so that a restart goes on where it stopped.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jinja2
import typer
from checkout import ROOT, commit
from goals import (
    DEFAULT,
    RETENTION,
    Results,
    ceiling_of,
    collect,
    needles,
    side,
    tasks_of,
)
from rich.console import Console

from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.provenance import provenance

SEED = 0
#: The default policy of a model without a profile.
NO_PROFILE = '{"name": "pyramid-no-profile", "layer_weights": null}'
#: Speeds are measured without a prefix cache, whatever prompts have in common.
NO_CACHING = ["--engine-args", '{"enable_prefix_caching": false}']
PRESSES = ("snapkv", "pyramidkv", "streaming_llm")
#: Figures of speed in the tables.
SPEEDS = {
    "total_tokens_per_s": "tokens/s",
    "ttft_p50_s": "TTFT p50, s",
    "tpot_p50_s": "TPOT p50, s",
    "max_num_running": "most at once",
    "num_preemptions": "preemptions",
    "kv_bytes_per_request": "KV bytes a request",
}


@dataclass(frozen=True)
class Step:
    """One command and where its results are."""

    name: str
    command: list[str]
    result: Path

    def load(self) -> Results:
        """The step's results."""
        found: Results = json.loads(self.result.read_text(encoding="utf-8"))
        return found


def step(name: str, kind: str, out: Path, options: str, *more: str) -> Step:
    """A command of ours; ``more`` may hold spaces."""
    folder = out / name
    command = ["pyramid-vllm", kind, *options.split(), *more, "--out", str(folder)]
    return Step(name, command, folder / "results.json")


def steps(out: Path, text: Path, second: Path | None) -> list[Step]:
    """All steps but the peers, which need what the first one evaluates."""
    lengths = "--prompt-tokens 2048 --retrieval-tokens 2048 --target-tokens 128"
    needles = "--retrieval single_needle --samples 1 --agreement-tokens 32"
    ours = f"{needles} --seed {SEED} --kv-policy pyramid --kv-policy"
    first = f"{lengths} --windows 6 --depths 6 --kv-policy "
    first += f"pyramid-by-depth --retention 0.3 --retention {RETENTION} "
    first += f"--retention 0.6 {ours}"
    more = (NO_PROFILE, "--text", str(text))
    found = [step("quality", "eval", out, first, *more)]
    if second is not None:
        options = f"{lengths} --windows 3 --depths 4 --retention "
        options += f"{RETENTION} {ours}"
        more += ("--model", str(second))
        found.append(step("quality-second", "eval", out, options, *more))
    one = "--num-prompts 1 --prompt-tokens 2048 --output-tokens 128 --kv-memory 2x"
    batch = "--num-prompts 8 --prompt-tokens 1024 --output-tokens 256 --kv-memory 4x "
    batch += "--kv-memory 12x --repeats 2"
    for name, options in (("one-prompt", one), ("batch", batch)):
        options = f"--seed {SEED} {options}"
        found.append(step(name, "bench", out, options, *NO_CACHING))
    return found


def peers(out: Path, first: Step) -> Step:
    """kvpress on the windows and needles of the first step, with the same share
    kept."""
    found = first.load()
    tasks, settings = tasks_of(found)
    ours = side(found)["continuation"]["summary"]["kept_share"]
    task = {
        "model": settings.model,
        "presses": dict.fromkeys(PRESSES, round(ours, 4)),
        "windows": [
            {"prompt": request.prompt_ids, "target": request.forced}
            for request in tasks["continuation"].requests
        ],
        "samples": [
            {"prompt": request.prompt_ids, "max_tokens": request.max_tokens}
            for request in tasks["retrieval"].requests
        ],
        "seed": SEED,
    }
    folder = out / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "input.json").write_text(json.dumps(task), encoding="utf-8")
    command = [".venv-peers/bin/python", "scripts/peers/kvpress_eval.py"]
    files = [str(folder / "input.json"), str(folder / "results.json")]
    return Step("peers", [*command, *files], folder / "results.json")


def run(step: Step, console: Console) -> None:
    """Run a step's command, with the programs of the environments that we made."""
    console.rule(step.name)
    console.print(shlex.join(step.command), markup=False)
    program, *arguments = step.command
    path = Path(sys.executable).with_name(program)
    if step.name == "peers":
        path = ROOT / os.environ.get("PYRAMID_PEERS_VENV", ".venv-peers") / "bin/python"
        arguments[0] = str(ROOT / arguments[0])
    subprocess.run([str(path), *arguments], check=True)


def write_results(
    docs: Path, found: Results, results: dict[str, Results], origin: Results
) -> None:
    """Write results.json and results.md.

    Args:
        docs: the folder.
        found: from ``collect``.
        results: of the steps, by name.
        origin: where the figures come from.
    """
    text = json.dumps(found | {"provenance": origin}, indent=2)
    (docs / "results.json").write_text(text + "\n", encoding="utf-8")
    file = ROOT / "scripts" / "results.md.jinja"
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(
        file.read_text(encoding="utf-8")
    )
    page = template.render(
        {"peers": None} | found,
        done=results,
        origin=origin,
        default=DEFAULT,
        figures=SPEEDS,
        mean=statistics.mean,
        needles=needles,
        ceiling_of=ceiling_of,
    )
    (docs / "results.md").write_text(page, encoding="utf-8")


def main(
    text: Annotated[Path, typer.Option(help="Long prose, not tuned on.")],
    second_model: Annotated[
        Path | None, typer.Option(help="Folder of a model of another family.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the steps.")] = Path("results"),
    docs: Annotated[Path, typer.Option(help="Where the results go.")] = ROOT / "docs",
) -> None:
    """Run every step, then write results.json and results.md."""
    console = Console()
    make_model()
    found = steps(out, text, second_model)
    for step in found:
        run(step, console)
    found.append(peers(out, found[0]))
    run(found[-1], console)
    origin = provenance(SEED) | {"commit": commit() or "unknown", "text": text.name}
    results = {step.name: step.load() for step in found}
    commands = {step.name: shlex.join(step.command) for step in found}
    write_results(docs, collect(results, commands), results, origin)
    console.print(f"written: {docs / 'results.json'}, {docs / 'results.md'}")


if __name__ == "__main__":
    typer.run(main)
