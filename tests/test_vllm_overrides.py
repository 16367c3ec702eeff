"""Every vLLM name that we override still is what it was when we read it.

A failing line means: read the new source, mend the override, then write the new digest
into scripts/vllm_api/vllm_names.py. Sources are read as text: not every module of vLLM
can be imported on every device.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "vllm_api"))

from check_vllm_api import installed
from vllm_names import DIGESTS
from vllm_tree import Tree, version_of

PLACE = installed()
assert PLACE is not None
VERSION = version_of(PLACE)
TREE = Tree({"vllm": PLACE})


def test_this_version_was_read() -> None:
    assert VERSION in DIGESTS


@pytest.mark.parametrize("path", DIGESTS.get(VERSION or "", {}))
def test_overridden_source_is_unchanged(path: str) -> None:
    found = TREE.find(path)
    assert found is not None
    assert TREE.digest(found) == DIGESTS[VERSION or ""][path]
