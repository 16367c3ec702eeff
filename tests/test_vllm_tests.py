"""The command that runs vLLM's own scheduler tests on our scheduler."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "vllm_tests"))

import vllm_tests
from vllm_tests import FILES, RUNS, Expected, app, compare, download, read_expected

STOCK = {"a.py::one": "", "a.py::two[1]": "", "a.py::two[2]": "", "a.py::broken": "E"}


@pytest.mark.parametrize(
    ("ours", "found"),
    [
        ({}, []),
        ({"a.py::one": "AssertionError: 1 == 2"}, [("fails", "a.py::one")]),
        ({"a.py::broken": "AssertionError"}, []),
        ({"a.py::two[1]": ""}, [("passes", "a.py::two[1]")]),
        ({"a.py::two[2]": "KeyError: 3"}, [("other error", "a.py::two[2]")]),
    ],
)
def test_what_is_not_listed_is_found(
    ours: dict[str, str], found: list[tuple[str, str]]
) -> None:
    group = Expected("refused", {"a.py": ["two"]}, ("half",), error="KVPolicyError")
    failing = {"a.py::two[1]": "KVPolicyError: 1", "a.py::two[2]": "KVPolicyError: 2"}
    findings = compare("half", STOCK, STOCK | failing | ours, [group])
    assert [(each.status, each.test) for each in findings] == found
    errors = {"fails", "other error"}
    assert [f.is_error for f in findings] == [status in errors for status, _ in found]


def test_a_group_is_of_its_runs_and_of_tests_that_exist() -> None:
    one = STOCK | {"a.py::one": "E"}
    group = Expected("counts", {"a.py": ["one"]}, ("half",))
    assert not compare("half", STOCK, one, [group])
    assert [f.status for f in compare("tiers", STOCK, one, [group])] == ["fails"]
    gone = Expected("counts", {"a.py": ["zero", "two[3]"]})
    assert [f.status for f in compare("half", STOCK, STOCK, [gone])] == ["gone"] * 2


def test_every_group_has_a_reason_and_names_of_files_and_runs() -> None:
    groups = read_expected()
    assert groups
    for group in groups:
        assert len(group.reason) > 10
        assert set(group.tests) <= set(FILES)
        assert set(group.runs) <= set(RUNS)
    for run in RUNS:
        names = [n for group in groups if run in group.runs for n in group.names()]
        assert len(names) == len(set(names)), "one reason for each test"


#: Stands for a file of vLLM's tests.
FILE = """
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

def test_ours(caplog_vllm):
    for cls in (Scheduler, AsyncScheduler):
        assert type(cls.__new__(cls)).__name__ == "TestedScheduler"

def test_fails():
    raise KeyError("x")
"""


def test_the_tests_build_our_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_tests, "FILES", ("core/test_it.py",))
    for folder in (tmp_path / "tests", tmp_path / "tests/core"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (tmp_path / "tests/core/test_it.py").write_text(FILE, encoding="utf-8")
    assert vllm_tests.run_tests(tmp_path, tmp_path, "half") == {
        "core/test_it.py::test_ours": "",
        "core/test_it.py::test_fails": "KeyError: 'x'",
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ours_fails_no_test_that_is_not_listed() -> None:
    try:
        download(vllm_tests.vllm_version(), "tests")
    except SystemExit as error:
        pytest.skip(str(error))
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 0, done.output


def test_an_unknown_run_is_refused() -> None:
    done = CliRunner().invoke(app, ["tears"])
    assert done.exit_code == 2
    assert "tears: valid are one-tier, tiers, half" in done.output
