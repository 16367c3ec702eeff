"""Apply ``patches/`` to a copy of vLLM, and run engines by the hooks that they add."""

import compileall
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from shutil import copyfile
from typing import Annotated, Any

import typer
from check_vllm_api import installed
from vllm_tree import version_of

from pyramid_vllm.native import SWITCH

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "patches"
RUNNERS = ("v1", "v2")
#: Tests of whole engines whose tokens are compared with an oracle's, with stock vLLM's,
#: or with the same request's alone; and those of the hooks themselves.
TESTS = (
    "test_native_hooks.py",
    "test_oracle.py",
    "test_parity.py",
    "test_eviction.py",
    "test_pruning.py",
    "test_prefix_caching.py",
    "test_request_policy.py",
    "test_cross_talk.py",
    "test_speculation.py",
    "test_lora.py",
)
#: On the V2 runner.
TESTS_V2 = ("test_native_hooks.py", "test_oracle.py", "test_cross_talk.py")


def series(version: str) -> list[Path]:
    """The patches for a version of vLLM, in order.

    Raises:
        SystemExit: names the versions that there are patches for.
    """
    match = re.match(r"\d+\.\d+\.\d+", version)
    folder = PATCHES / (match.group() if match else version)
    if not folder.is_dir():
        valid = ", ".join(
            sorted(path.name for path in PATCHES.iterdir() if path.is_dir())
        )
        raise SystemExit(f"no patches for vLLM {version}: there are those for {valid}")
    return sorted(folder.glob("*.patch"))


def copy_tree(place: Path, target: Path) -> None:
    """Copy vLLM's Python files; what else its folder holds is linked.

    Args:
        place: a wheel, or the folder that ``vllm`` lies in.
        target: where ``vllm`` comes to lie.
    """
    if place.suffix == ".whl":
        with zipfile.ZipFile(place) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".py")]
            wheel.extractall(target, names)
        return
    for path in (place / "vllm").rglob("*"):
        if "__pycache__" in path.parts or path.is_dir():
            continue
        copied = target / path.relative_to(place)
        copied.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            copyfile(path, copied)
        else:
            copied.symlink_to(path)


def apply(patches: list[Path], target: Path) -> None:
    """Apply a series to a copy, each patch as it is, and compile what it touches.

    Raises:
        SystemExit: names the patch that does not apply or compile.
    """
    for patch in patches:
        command = ["git", "apply", "--verbose", str(patch)]
        # Not as a part of a checkout that the copy may lie in.
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(target.parent)}
        done = subprocess.run(
            command, cwd=target, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{patch.name} does not apply:\n{done.stderr}")
        touched = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text("utf-8"), re.MULTILINE)
        if not touched:
            raise SystemExit(f"{patch.name} changes nothing")
        for name in touched:
            if not compileall.compile_file(str(target / name), quiet=1, force=True):
                raise SystemExit(f"{patch.name}: {name} does not compile")
        print(f"applied {patch.name}: {', '.join(touched)}", flush=True)


def environment(tree: Path | None) -> dict[str, str]:
    """Variables of a process that runs by the hooks of a tree, or by our overrides."""
    paths = [str(tree)] if tree else []
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
        SWITCH: "1" if tree else "0",
    }


def run_engine(runner: str, tree: Path | None, result: Path) -> dict[str, Any]:
    """Tokens and counts of one engine for each policy, in a process of its own."""
    command = [sys.executable, "-m", "tests.hook_tokens", runner, str(result)]
    subprocess.run(command, cwd=ROOT, env=environment(tree), check=True)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def compare(tree: Path, folder: Path, runners: tuple[str, ...] = RUNNERS) -> list[str]:
    """Run the same requests by overrides and by hooks.

    Args:
        tree: the folder of the patched copy.
        folder: for results.
        runners: of ``RUNNERS``.

    Returns:
        What differs, by runner and policy.
    """
    wrong = []
    for runner in runners:
        ours = run_engine(runner, None, folder / f"{runner}-overrides.json")
        hooks = run_engine(runner, tree, folder / f"{runner}-hooks.json")
        assert str(tree) in hooks.pop("vllm"), "the hooks ran on another vLLM"
        assert str(tree) not in ours.pop("vllm"), (
            "the overrides ran on the patched vLLM"
        )
        for policy, expected in ours.items():
            same = hooks[policy] == expected
            print(
                f"{runner} {policy}: {expected['counts']}, "
                f"{sum(map(len, expected['tokens']))} tokens "
                f"{'are the same' if same else 'DIFFER'}",
                flush=True,
            )
            if not same:
                wrong.append(f"{runner} {policy}: {hooks[policy]['counts']}")
    return wrong


def run_tests(tree: Path, names: tuple[str, ...], backend: str | None) -> int:
    """Run tests of whole engines by the hooks; pytest's exit status."""
    env = environment(tree)
    if backend is not None:
        env["PYRAMID_TEST_BACKEND"] = backend
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile"]
    command += ["-q", "-k", "not real_model"]
    command += [f"tests/{name}" for name in names]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


app = typer.Typer(add_completion=False)


@app.command()
def main(
    apply_only: Annotated[
        Path | None, typer.Option(help="A wheel or folder of vLLM: nothing is run.")
    ] = None,
    tests: Annotated[
        bool, typer.Option(help="Also run the tests of whole engines.")
    ] = True,
) -> None:
    """Check the patches; exit status 1 if tokens differ or a test fails."""
    place = apply_only or installed()
    if place is None:
        raise SystemExit("vLLM is not installed: scripts/setup cpu does that")
    version = version_of(place)
    if version is None:
        raise SystemExit(f"{place} holds no vLLM")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        copy_tree(place, tree)
        patches = series(version)
        apply(patches, tree)
        print(f"{len(patches)} patches apply to vLLM {version}")
        if apply_only is not None:
            return
        wrong = compare(tree, Path(folder))
        if wrong:
            raise SystemExit("tokens or counts differ:\n" + "\n".join(wrong))
        if tests:
            failed = run_tests(tree, TESTS, None)
            failed |= run_tests(tree, TESTS_V2, "TRITON_ATTN")
            raise typer.Exit(failed)


if __name__ == "__main__":
    app()
