"""The Triton kernels, compiled for GPUs on a machine that needs none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

KERNELS = {
    "_combine_kernel",
    "_compact_kernel",
    "_index_kernel",
    "_key_diff_kernel",
    "_key_norm_kernel",
    "_lengths_kernel",
    "_missing_kernel",
    "_move_kernel",
    "_normalizer_kernel",
    "_pool_kernel",
    "_score_kernel",
    "_select_kernel",
    "_store_kernel",
}
#: Shared memory of a block on the GPUs that have least of it, from Ampere on.
MAX_SHARED = 99 << 10

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Triton's compiler runs on Linux alone"
)


def compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What ``tests.compiled_kernels`` compiles; its process does not interpret
    kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_kernels", *arguments],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("triton"), "80")


def check_resources(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        name = f"{kernel['kernel']} of {kernel['variant']}"
        assert kernel["shared"] <= MAX_SHARED, f"{name} takes too much shared memory"
        if "fp32" not in kernel["variant"]:
            assert not kernel["resources"]["stack"], f"{name} spills registers"


def steps_of(kernel: dict[str, Any]) -> list[str]:
    """How a kernel reads, writes and waits, each run of them once."""
    kinds = ("".join(name.split(".")[:1]) for name in kernel["order"])
    return [kind for kind, _ in groupby(kinds)]


def check_compaction(kernels: list[dict[str, Any]]) -> None:
    """All of a block is read, 16 bytes at once, before any of it is written."""
    compactions = [k for k in kernels if k["kernel"] == "_compact_kernel"]
    assert compactions
    for kernel in compactions:
        assert steps_of(kernel)[-3:] == ["ld", "bar", "st"], kernel["variant"]
        assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(kernel["order"])


def test_every_kernel_compiles(few: list[dict[str, Any]]) -> None:
    assert {kernel["kernel"] for kernel in few} == KERNELS


def test_nothing_spills(few: list[dict[str, Any]]) -> None:
    check_resources(few)


def test_compaction_reads_before_it_writes(few: list[dict[str, Any]]) -> None:
    check_compaction(few)


def test_other_requests_and_layers_compile_nothing(few: list[dict[str, Any]]) -> None:
    """Otherwise requests would wait for a compiler in the middle of serving."""
    again = [kernel for kernel in few if kernel["variant"].startswith("again")]
    assert not [(kernel["kernel"], kernel["variant"]) for kernel in again]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_variant_compiles(capability: str, tmp_path: Path) -> None:
    kernels = compiled(tmp_path, capability, "--every")
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    check_resources(kernels)
    check_compaction(kernels)
