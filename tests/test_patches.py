"""Each of ``patches/`` applies, compiles, does what its text says, and is explained."""

import os
import re
import shutil
import subprocess
import sys
from compileall import compile_file
from pathlib import Path

import pytest
from vllm_names import DIGESTS
from vllm_source import ROOT, download, installed

PATCHES = ROOT / "patches"
LEDGER = (PATCHES / "README.md").read_text(encoding="utf-8")
VERSIONS = sorted(path.name for path in PATCHES.iterdir() if path.is_dir())


def series(version: str) -> list[Path]:
    """The patches for a version of vLLM, in order."""
    return sorted((PATCHES / version).glob("*.patch"))


def name_of(patch: Path) -> str:
    """``explicit-group-key`` of ``0003-explicit-group-key.patch``."""
    return patch.stem.partition("-")[2]


NAMES = [name_of(patch) for patch in series("0.32.0")]


def patched_copy(place: Path, target: Path, version: str) -> Path:
    """Apply a series to links to vLLM's files, and compile what it touches.

    Args:
        place: the folder in which ``vllm`` lies.
        target: where the copy comes to lie.
        version: of vLLM.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(
        place / "vllm", target / "vllm", ignore=ignored, copy_function=os.symlink
    )
    # Not as a part of a checkout that the copy may lie in.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(target.parent)}
    for patch in series(version):
        text = patch.read_text(encoding="utf-8")
        touched = re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE)
        assert touched, patch.name
        for path in map(target.joinpath, touched):
            if path.is_symlink():
                source = path.readlink()
                path.unlink()
                shutil.copyfile(source, path)
        command = ["git", "apply", str(patch)]
        done = subprocess.run(
            command, cwd=target, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{patch.name}: {done.stderr}"
        for path in map(target.joinpath, touched):
            assert compile_file(path, quiet=1, force=True), f"{patch.name}: {path}"
    return target


def run_hooks(place: Path) -> dict[str, str]:
    """What became of each test of ``tests/patched/hooks.py`` with the vLLM in a folder:
    PASSED or FAILED by the name of its patch."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(place), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", "tests/patched/hooks.py"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^(PASSED|FAILED) \S+::test_(\w+)", done.stdout, re.MULTILINE)
    assert found, done.stdout[-4000:] + done.stderr[-4000:]
    print(done.stdout)
    return {name.replace("_", "-"): outcome for outcome, name in found}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Outcomes of all patches' tests, with the installed vLLM and with a patched
    copy."""
    tree = tmp_path_factory.mktemp("patches") / "tree"
    patched_copy(installed(), tree, "0.32.0")
    return [run_hooks(installed()), run_hooks(tree)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_a_patch_does_what_it_says(outcomes: list[dict[str, str]], name: str) -> None:
    """The patch's own test fails without the patches and passes with them."""
    assert [outcome[name] for outcome in outcomes] == ["FAILED", "PASSED"]


@pytest.mark.timeout(600)
def test_the_series_applies_to_the_next_vllm(tmp_path: Path) -> None:
    try:
        sources = download("0.33.0")
    except SystemExit as error:
        pytest.skip(str(error))
    tree = patched_copy(sources, tmp_path / "tree", "0.33.0")
    output = (tree / "vllm/v1/core/sched/output.py").read_text(encoding="utf-8")
    assert "plugin_metadata" in output


def test_every_version_has_the_whole_series() -> None:
    assert set(VERSIONS) == set(DIGESTS)
    for version in VERSIONS:
        assert [name_of(patch) for patch in series(version)] == NAMES


@pytest.mark.parametrize("version", VERSIONS)
def test_every_patch_says_why_what_and_how_it_is_tested(version: str) -> None:
    for patch in series(version):
        header, _, diff = patch.read_text(encoding="utf-8").partition("\n---\n")
        assert re.match(r"Subject: \[[\w ]+\] \S", header), patch.name
        parts = re.findall(r"^(\w+)\n {4}\S", header, re.MULTILINE)
        assert parts == ["Purpose", "What", "Test"], patch.name
        changed = re.findall(r"^[+-](?![+-]{2} )", diff, re.MULTILINE)
        assert 0 < len(changed) < 100, f"{patch.name} is not small"


def test_the_ledger_knows_every_patch() -> None:
    named = set(re.findall(r"`\d{4}-([\w-]+)`", LEDGER))
    assert named == set(NAMES)


def test_the_ledger_s_rows_have_a_status() -> None:
    ledger = LEDGER.partition("## Ledger")[2]
    rows = [line for line in ledger.splitlines() if re.match(r"\| (?!name|---)", line)]
    assert len(rows) > 20
    for row in rows:
        status = row.rstrip(" |").rpartition("|")[2].strip()
        assert status.split(":")[0] in {"patch", "public", "none"}, row
