"""vLLM's own scheduler tests, run on our scheduler and on vLLM's."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from packaging.version import Version

from pyramid_vllm.compat import installed_vllm_version
from pyramid_vllm.tools.provenance import write_report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "vllm_api"))

from models import write_models  # noqa: E402
from vllm_source import download  # noqa: E402

#: Of each test that ran: the error, empty if it passed.
Results = Mapping[str, str]

#: Files whose tests build a scheduler, and fast.
FILES = (
    "v1/core/test_scheduler.py",
    "v1/core/test_async_scheduler.py",
    "v1/core/test_priority_preemption_bug.py",
    "v1/core/test_deferred_block_free.py",
    "v1/core/test_prefix_caching.py",
    "v1/core/test_prefix_replay.py",
    "v1/core/test_swa_inflight_window_free.py",
    "v1/core/test_worker_slot_overflow.py",
    "v1/streaming_input/test_scheduler_streaming.py",
    "v1/spec_decode/test_dynamic_sd.py",
)
#: As much like vLLM's scheduler as a policy can be: pages are counted the same way.
_PLAIN = {
    "name": "pyramid-by-depth",
    "retention": 1.0,
    "growth_reserve": 0,
    "tiers": 4,
}
#: So small that the tests' short prompts are evicted.
_SMALL = {"sinks": 1, "recent": 2, "min_context": 4}
RUNS: dict[str, dict[str, Any]] = {
    "one-tier": _PLAIN | {"tiers": 1},
    "tiers": _PLAIN,
    "half": _PLAIN | _SMALL | {"retention": 0.5},
}


@dataclass(frozen=True)
class Expected:
    """Tests that fail on ours for one reason, as ``expected.yaml`` has them."""

    reason: str
    tests: dict[str, list[str]]
    """By file: a test, or all cases of a test by its name without them."""
    runs: tuple[str, ...] = tuple(RUNS)
    error: str = ""
    """Text that each of the errors has."""

    def names(self) -> Iterator[str]:
        """The tests as pytest names them."""
        for file, tests in self.tests.items():
            yield from (f"{file}::{test}" for test in tests)


def read_expected(file: Path = HERE / "expected.yaml") -> list[Expected]:
    """The groups of tests that are expected to fail."""
    return [Expected(**group) for group in yaml.safe_load(file.read_text("utf-8"))]


@dataclass(frozen=True)
class Finding:
    """A test whose result is not the expected one."""

    status: str
    """fails, other error, passes or gone."""
    test: str
    detail: str

    @property
    def is_error(self) -> bool:
        """Whether somebody has to look: our scheduler does not do what vLLM's does."""
        return self.status in ("fails", "other error")


def compare(
    run: str, stock: Results, ours: Results, groups: list[Expected]
) -> list[Finding]:
    """What a run shows that the groups do not say, of tests that stock passes."""
    listed = {name: g for g in groups if run in g.runs for name in g.names()}
    findings, seen = [], set()
    for test, stock_error in stock.items():
        name = test if test in listed else test.partition("[")[0]
        seen.add(name)
        group, error = listed.get(name), ours.get(test, "it did not run")
        if stock_error:
            continue
        if group is None and error:
            findings.append(Finding("fails", test, error))
        elif group is not None and not error:
            findings.append(Finding("passes", test, group.reason))
        elif group is not None and group.error not in error:
            findings.append(Finding("other error", test, error))
    gone = (Finding("gone", n, listed[n].reason) for n in listed if n not in seen)
    return findings + list(gone)


def vllm_version() -> str:
    """The installed vLLM's version, as its source distribution has it."""
    return Version(installed_vllm_version() or "").public


def run_tests(sources: Path, folder: Path, name: str) -> dict[str, str]:
    """Results of vLLM's tests, with vLLM's own scheduler or one of ``RUNS``.

    Args:
        sources: the folder in which ``tests`` lies.
        folder: has the models; pytest's output and the results go there.
        name: of the run; any other is vLLM's.

    Raises:
        SystemExit: the tests did not run.
    """
    results, log = folder / f"{name}.json", folder / f"{name}.log"
    # vLLM's tests before ours: both are the package `tests`.
    path = (sources, HERE, ROOT)
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_TESTS_RESULTS": str(results),
        "VLLM_TESTS_POLICY": json.dumps(RUNS[name]) if name in RUNS else "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "scheduler_plugin", "-q"]
    command += ["--noconftest", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir", str(sources / "tests"), "--timeout", "120", "--tb=short"]
    command += [str(sources / "tests" / file) for file in FILES]
    with log.open("w") as output:
        subprocess.run(
            command,
            cwd=folder,
            env=os.environ | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not results.exists():
        raise SystemExit(f"vLLM's tests did not run:\n{log.read_text('utf-8')}")
    found: dict[str, str] = json.loads(results.read_text("utf-8"))
    return found


def run_all(runs: list[str], jobs: int) -> dict[str, dict[str, str]]:
    """Results of each run, ``stock`` first.

    Args:
        runs: of ``RUNS``.
        jobs: runs at once.
    """
    sources = download(vllm_version(), "tests")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        write_models(Path(name))
        names = ("stock", *runs)
        results = pool.map(lambda run: run_tests(sources, Path(name), run), names)
        return dict(zip(names, results, strict=True))


def show(run: str, results: Results, findings: list[Finding]) -> None:
    """Print a run's findings, each with the first line of its error."""
    num_passed = sum(not error for error in results.values())
    counts = Counter(finding.status for finding in findings)
    counted = (f", {count} {status}" for status, count in counts.items())
    print(f"{run}: {num_passed} of {len(results)} pass", *counted, sep="")
    for each in findings:
        print(f"  {each.status}  {each.test}  {each.detail.partition(chr(10))[0]}")


app = typer.Typer(add_completion=False)


@app.command()
def main(
    runs: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(RUNS)}; by default all.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at once, each 1 GB.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Run vLLM's scheduler tests on ours; exit status 1 if one fails that vLLM's
    scheduler passes and that expected.yaml does not list."""
    chosen = runs or list(RUNS)
    if unknown := set(chosen) - set(RUNS):
        raise typer.BadParameter(f"{', '.join(unknown)}: valid are {', '.join(RUNS)}")
    results, groups = run_all(chosen, jobs), read_expected()
    if json_file is not None:
        write_report(json_file, {"vllm": vllm_version(), "runs": results}, 0)
    stock = results.pop("stock")
    show("stock", stock, [])
    is_error = False
    for run, ours in results.items():
        findings = compare(run, stock, ours, groups)
        show(run, ours, findings)
        is_error |= any(finding.is_error for finding in findings)
    raise typer.Exit(is_error)


if __name__ == "__main__":
    app()
