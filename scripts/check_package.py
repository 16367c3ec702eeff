"""Whether the distribution is complete, and works where nothing else of ours is.

Builds the sdist, and the wheel from the sdist, looks at what is in them, installs the
wheel into a fresh environment, and uses it there from an empty folder.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from packaging.metadata import Metadata

import pyramid_vllm

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "scripts/package_smoke.py"

#: Files of the repository that the sdist leaves out.
NOT_IN_SDIST = {".ci/run"}
#: Folders of ``configs`` that the package or its users read.
SHIPPED_CONFIGS = ("policies", "profiles", "shapes", "gpus", "grafana", "prometheus")
TIMEOUT_S = 300

TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}


def build(folder: Path, isolated: bool) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder)]
    command += [] if isolated else ["--no-isolation"]
    subprocess.run([*command, str(ROOT)], check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def repository() -> set[str]:
    """Files of the working tree that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others"]
    command += ["--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def check_sdist(sdist: Path) -> None:
    """The sdist holds the repository, and nothing that is not in it."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    _same(names - {"PKG-INFO"}, repository() - NOT_IN_SDIST, sdist)


def check_wheel(wheel: Path) -> None:
    """The wheel holds the package, the shipped configurations and the licence, only."""
    configs = tuple(f"configs/{folder}/" for folder in SHIPPED_CONFIGS)
    expected = {
        name if name.startswith("pyramid_vllm/") else f"pyramid_vllm/{name}"
        for name in repository()
        if name.startswith(("pyramid_vllm/", *configs))
    }
    info = f"pyramid_vllm-{pyramid_vllm.__version__}.dist-info"
    files = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = Metadata.from_email(archive.read(f"{info}/METADATA"))
    _same(names, expected | {f"{info}/{name}" for name in files}, wheel)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata.description == readme, "the README is not the description"
    assert metadata.description_content_type == "text/markdown"


def _same(found: set[str], expected: set[str], archive: Path) -> None:
    missing, more = sorted(expected - found), sorted(found - expected)
    assert not missing, f"{archive.name} lacks {missing}"
    assert not more, f"{archive.name} has {more} besides"


def install_alone(wheel: Path, folder: Path) -> Path:
    """Install the wheel where everything else is ours; returns its programs' folder.

    A line of a .pth file adds our site-packages after its own, without the .pth files
    there: an editable install of ours is not seen.
    """
    venv.create(folder)
    python = folder / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    subprocess.run([*command, "--quiet", "--no-deps", str(wheel)], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "ours.pth").write_text("\n".join(sorted(ours)) + "\n", encoding="utf-8")
    return python.parent


def install_whole(wheel: Path, folder: Path) -> Path:
    """Install the wheel with vLLM's CPU build and all dependencies, as a user does."""
    venv.create(folder, with_pip=True)
    install = [str(ROOT / "scripts/install"), str(folder), f"{wheel}[cpu]"]
    subprocess.run(install, check=True)
    return folder / "bin"


def use(programs: Path, folder: Path, in_process: bool) -> None:
    """Run the installed commands and an engine, in a folder of nothing but a model."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY_MODEL), encoding="utf-8")
    python, command = programs / "python", str(programs / "pyramid-vllm")
    version = pyramid_vllm.__version__
    vllm = [str(python), "-P", "-m", "vllm.entrypoints.cli.main"]
    smoke = [str(python), "-P", str(SMOKE), version, str(model)]
    uses = [
        ([*smoke, *(["--in-process"] if in_process else [])], "tokens evicted"),
        ([*vllm, "serve", "--help=KVPolicy"], "--kv-policy-config"),
        ([command, "plan", str(model), "--max-model-len", "1024"], "KV bytes"),
        ([command, "--version"], f"pyramid-vllm {version}\n"),
        ([command, "--help"], "name-vllm"),
    ]
    # The first two take long, mostly because they import vLLM.
    with ThreadPoolExecutor(max_workers=2) as pool:
        printed = list(pool.map(lambda use: _printed(folder, *use), uses))
    print(printed[0].splitlines()[-1])


def _printed(folder: Path, command: list[str], expected: str) -> str:
    """Run a command; its output has to hold some words."""
    changes = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "COLUMNS": "120"}
    environment = dict(os.environ) | changes
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode or expected not in done.stdout:
        shown = " ".join(command)
        raise SystemExit(f"{shown}: {expected!r} is missing in\n{done.stdout}")
    return done.stdout


app = typer.Typer(add_completion=False)


@app.command()
def main(
    full: Annotated[
        bool,
        typer.Option(help="Install all dependencies from the index: minutes."),
    ] = False,
) -> None:
    """Build, inspect, install and use the distribution."""
    with tempfile.TemporaryDirectory(prefix="check-package-") as name:
        folder = Path(name)
        sdist, wheel = build(folder / "dist", isolated=full)
        check_sdist(sdist)
        check_wheel(wheel)
        install = install_whole if full else install_alone
        programs = install(wheel, folder / "environment")
        (folder / "outside").mkdir()
        use(programs, folder / "outside", in_process=not full)
    how = "with all its dependencies" if full else "on this environment's dependencies"
    print(f"{sdist.name} and {wheel.name} are whole; the wheel works {how}")


if __name__ == "__main__":
    app()
