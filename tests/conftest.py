"""Shared fixtures. Engines run in this process, so that tests can look inside."""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each process has one thread, because more threads would mostly wait. It is no
    # default value, because workers inherit what their parent process has set.
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ["HF_HUB_OFFLINE"] = "1"
# The GPU's attention backend that all engines use, with vLLM's V2 runner. It has to be
# set before vLLM is imported.
BACKEND = os.environ.get("PYRAMID_TEST_BACKEND")
if BACKEND is not None:
    from tests import gpu_on_cpu

    gpu_on_cpu.prepare()
# Kernels run interpreted; vLLM sees no Triton driver and does not care.
os.environ.setdefault("TRITON_INTERPRET", "1")

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.models import TINY_LLAMA, save_tiny_llama

# Tests import scripts as modules.
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path[:0] = [str(SCRIPTS / part) for part in ("", "ray", "vllm_api")]

# No test checks time. CI draws the same examples every time.
settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _backend() -> None:
    """Put the wrapped backend under test in the place of ``CPU_ATTN``."""
    if BACKEND is not None:
        gpu_on_cpu.use_wrapped_backend(BACKEND)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama with 6 layers."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), TINY_LLAMA)


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of SmolLM2-135M-Instruct; made on first use."""
    from pyramid_vllm.tools.cli.model import make_model

    return str(make_model())


@pytest.fixture
def policy_file(tmp_path: Path) -> Iterator[Path]:
    """Path for a policy file that the test writes."""
    return tmp_path / "policy.yaml"


#: Files that take longest. They start first: with one of them at the end, the other
#: processes would have nothing left to do.
LONGEST = (
    "test_gpu_backends",
    "test_fuzz",
    "test_oracle",
    "test_kill",
    "test_ray_data",
    "test_ray",
    "test_gpu_check",
    "test_serve",
    "test_speculation",
    "test_cross_talk",
    "test_bench",
    "test_pruning",
    "test_mrope",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests that take minutes")
    parser.addoption("--long", action="store_true", help="fuzz ten times as long")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
    for name in ("slow", "long"):
        if config.getoption(f"--{name}"):
            continue
        skip = pytest.mark.skip(reason=f"takes minutes; run with --{name}")
        for item in items:
            if name in item.keywords:
                item.add_marker(skip)
