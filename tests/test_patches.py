"""``patches/``: they apply, they are explained, and the ledger knows every one."""

import re
import sys
from pathlib import Path

import pytest
from vllm.v1.core.sched.output import SchedulerOutput

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "vllm_api"))

from check_patches import TESTS, TESTS_V2, apply, compare, copy_tree, series
from check_vllm_api import installed
from vllm_names import DIGESTS

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
LEDGER = (PATCHES / "README.md").read_text(encoding="utf-8")
VERSIONS = ("0.32.0", "0.33.0")


def name_of(patch: Path) -> str:
    """``explicit-group-key`` of ``0003-explicit-group-key.patch``."""
    return patch.stem.partition("-")[2]


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed vLLM, patched."""
    place, tree = installed(), tmp_path_factory.mktemp("patches") / "tree"
    assert place is not None
    copy_tree(place, tree)
    apply(series("0.32.0"), tree)
    return tree


def test_the_series_applies_to_the_installed_vllm(patched: Path) -> None:
    output = (patched / "vllm/v1/core/sched/output.py").read_text(encoding="utf-8")
    assert "plugin_metadata" in output
    assert "plugin_metadata" not in SchedulerOutput.__dataclass_fields__


@pytest.mark.timeout(600)
@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_hooks_give_the_tokens_of_overrides(patched: Path, runner: str) -> None:
    """Three ways of evicting, in processes of their own, of which each asserts that
    something was evicted; counts are compared with the tokens."""
    assert compare(patched, patched.parent, (runner,)) == []


def test_a_patch_that_does_not_apply_is_named(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    with pytest.raises(SystemExit, match="0001-registry-built-ins-first"):
        apply(series("0.32.0"), tmp_path)


def test_every_version_has_the_whole_series() -> None:
    assert set(VERSIONS) == set(DIGESTS)
    for version in VERSIONS:
        assert [name_of(patch) for patch in series(version)] == list(_HOOKS)
    with pytest.raises(SystemExit, match=r"those for 0\.32\.0, 0\.33\.0"):
        series("0.31.0")


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
    assert named == set(_HOOKS)


def test_the_ledger_s_rows_have_a_status() -> None:
    ledger = LEDGER.partition("## Ledger")[2]
    rows = [line for line in ledger.splitlines() if re.match(r"\| (?!name|---)", line)]
    assert len(rows) > 20
    for row in rows:
        status = row.rstrip(" |").rpartition("|")[2].strip()
        assert status.split(":")[0] in {"patch", "public", "none"}, row


def test_check_patches_runs_tests_that_there_are() -> None:
    for name in (*TESTS, *TESTS_V2):
        assert (ROOT / "tests" / name).is_file(), name


def test_hooks_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stock vLLM the switch is refused, before anything runs by half a hook."""
    monkeypatch.setenv(SWITCH, "1")
    uses_native_hooks.cache_clear()
    try:
        with pytest.raises(KVPolicyError, match=", ".join(_HOOKS)):
            check_native_hooks()
        monkeypatch.setenv(SWITCH, "yes")
        uses_native_hooks.cache_clear()
        with pytest.raises(KVPolicyError, match=f"{SWITCH} is 'yes': valid are"):
            uses_native_hooks()
    finally:
        monkeypatch.undo()
        uses_native_hooks.cache_clear()
