"""Whether a version of vLLM has what the package relies on, from its sources alone.

Nothing of that version is imported or run. What our overrides take the place of is
known from the version that is installed.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from vllm_checks import Finding, check
from vllm_tree import version_of
from vllm_uses import THEIRS


def installed() -> Path | None:
    """The folder that the installed vLLM lies in."""
    spec = find_spec(THEIRS)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))).parent if places else None


def table(findings: list[Finding], version: str, everything: bool) -> Table:
    """Findings as people read them."""
    made = Table(title=f"What pyramid-vllm relies on, in vLLM {version}")
    for column in ("", "vLLM's name", "ours", ""):
        made.add_column(column, overflow="fold")
    styles = {"gone": "bold red", "differs": "bold red", "changed": "yellow"}
    for finding in sorted(findings, key=lambda f: (not f.is_error, f.status)):
        if everything or finding.status in styles:
            made.add_row(
                finding.status,
                f"{finding.kind} {finding.name}",
                finding.where,
                finding.detail,
                style=styles.get(finding.status),
            )
    return made


def summary(findings: list[Finding]) -> str:
    """Counts by kind and status."""
    counts: dict[tuple[str, str], int] = {}
    for finding in findings:
        key = finding.kind, finding.status
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{n} {kind} {status}" for (kind, status), n in counts.items())


def download(version: str, folder: Path) -> Path:
    """The version's wheel, from the package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"vllm=={version}"]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


app = typer.Typer(add_completion=False)


@app.command()
def main(
    version: Annotated[str, typer.Argument(help="Of vLLM, as 0.33.0.")],
    wheel: Annotated[
        Path | None, typer.Option(help="Its wheel or folder; else downloaded.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Each name found.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Check vLLM's sources; exit status 1 if the package cannot work with them."""
    base = installed()
    if base is None:
        raise SystemExit("vLLM is not installed: scripts/setup cpu does that")
    with tempfile.TemporaryDirectory() as folder:
        place = wheel or download(version, Path(folder))
        found = version_of(place)
        if found != version:
            raise SystemExit(f"{place} is vLLM {found}: valid is {version}")
        findings = check(place, base, version)
    Console().print(table(findings, version, show_all))
    print(summary(findings))
    if json_file is not None:
        content = {
            "vllm": version,
            "compared_with": version_of(base),
            "findings": [asdict(finding) for finding in findings],
        }
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(any(finding.is_error for finding in findings))


if __name__ == "__main__":
    app()
