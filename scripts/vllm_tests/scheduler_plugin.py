"""pytest plugin: vLLM's own tests build another scheduler than they name.

A test that builds ``Scheduler`` or ``AsyncScheduler`` gets vLLM's ``AsyncScheduler``
or, if ``VLLM_TESTS_POLICY`` has a policy as JSON, ours. Nothing else is changed.
Results are written to the file that ``VLLM_TESTS_RESULTS`` names: of each test that
ran, the error; empty if it passed.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

results: dict[str, str] = {}


def pytest_configure() -> None:
    """Replace the scheduler, before any test is imported."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    chosen: type = AsyncScheduler
    if policy := os.environ.get("VLLM_TESTS_POLICY"):
        from tested_scheduler import with_policy

        chosen = with_policy(json.loads(policy))

    def new(cls: type, *_args: Any, **_kwargs: Any) -> Any:
        return object.__new__(chosen if cls in (Scheduler, AsyncScheduler) else cls)

    # The names stay vLLM's, for tests that call or patch a method of its class.
    Scheduler.__new__ = new


@pytest.fixture
def caplog_vllm(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """What vLLM's conftest.py has by this name. It is not loaded, because it imports
    packages that no scheduler needs."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Take a test's result."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        results[report.nodeid] = crash.message if crash else str(report.longrepr)
    elif report.when == "call" and report.passed:
        results.setdefault(report.nodeid, "")


def pytest_sessionfinish() -> None:
    """Write the results."""
    text = json.dumps(results, indent=1)
    Path(os.environ["VLLM_TESTS_RESULTS"]).write_text(text, encoding="utf-8")
