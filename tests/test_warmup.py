"""Every kernel that a valid request can reach is compiled before the first one."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.test_buffers import recorded
from tests.test_kernels_compile import KERNELS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Triton's compiler runs on Linux alone"
)

#: Engines by name: their policy, and the parts of the warm-up that they need.
_ALL = {"other policies", "small blocks of queries", "long prompts", "lengths"}
_ALL |= {"scores", "choice"}
ENGINES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "pyramid": ({"base": "pyramid"}, _ALL),
    "pyramidinfer": (
        {"base": "pyramidinfer", "prefill_decay_ratio": 0.5},
        _ALL | {"rows", "generated"},
    ),
    "generation by head, eight bits": (
        {"base": "pyramid", "exceed_length_to_compress": 16, "recent": 16},
        _ALL | {"generated"},
    ),
}


@pytest.fixture(scope="module")
def swept(tiny_llama: str) -> dict[str, dict[str, Any]]:
    kinds = (("float32", False), ("bfloat16", False), ("bfloat16", True))
    arguments = [
        {"model": tiny_llama, "policy": policy, "dtype": dtype, "is_quantized": eight}
        for (dtype, eight), (policy, _) in zip(kinds, ENGINES.values(), strict=True)
    ]
    return dict(zip(ENGINES, recorded("sweep", arguments), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_request_waits_for_a_compiler(
    engine: str, swept: dict[str, dict[str, Any]]
) -> None:
    """Prompts of 1 to 40,000 tokens, under every policy that requests may name."""
    found = swept[engine]
    assert found["finished"]
    assert len(found["policies"]) > 8
    assert found["new"] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_each_part_of_the_warm_up_is_needed(
    engine: str, swept: dict[str, dict[str, Any]]
) -> None:
    """Without it requests would compile kernels: the sweep reaches all parts."""
    without = swept[engine]["without"]
    assert {part for part, count in without.items() if count} == ENGINES[engine][1]


def test_the_sweep_reaches_every_kernel(swept: dict[str, dict[str, Any]]) -> None:
    # No engine of the sweep compresses segments.
    reached = {name for found in swept.values() for name in found["kernels"]}
    assert reached == KERNELS - {"_key_diff_kernel"}
