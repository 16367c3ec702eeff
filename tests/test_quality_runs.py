"""The evaluation's runs: resumed, checked and reported, over a faked engine."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.plotting import check_matplotlib
from pyramid_vllm.tools.quality import jobs, runner
from pyramid_vllm.tools.quality.activity import Activity
from pyramid_vllm.tools.quality.evaluation import Evaluation, check_activity
from pyramid_vllm.tools.quality.jobs import Job, JobResult, Request
from pyramid_vllm.tools.quality.report import Outcome, outcomes_of, tables
from pyramid_vllm.tools.quality.settings import EvalSettings, make_sides
from pyramid_vllm.tools.quality.tasks import Task, agreement_task, continuation_task
from pyramid_vllm.tools.quality.texts import windows
from tests.models import TINY_LLAMA, save_config
from tests.one_engine import save_tokenizer

SETTINGS = EvalSettings(model="tiny", retentions=(0.5, 0.3))


def make_tasks() -> list[Task]:
    found = windows(range(3000), 400, 4, 3)
    return [continuation_task(found), agreement_task(found, 4)]


class FakeEngine:
    """Evicts as the task asks; the less it keeps, the higher the loss."""

    def __init__(self, fail_after: int | None = None, evicts: bool = True) -> None:
        self.jobs: list[tuple[str | None, float | None]] = []
        self.fail_after = fail_after
        self.evicts = evicts

    def __call__(
        self,
        llm_args: dict[str, Any],
        jobs: list[Job],
        on_result: Callable[[JobResult], None],
        on_progress: Callable[[int], None],
    ) -> None:
        policy = llm_args["kv_policy"]
        name = policy and json.loads(policy)["name"]
        for job in jobs:
            if len(self.jobs) == self.fail_after:
                raise RuntimeError("the machine went away")
            self.jobs.append((name, job.retention))
            kept = 1.0 if name is None else job.retention or 0.5
            kept = kept if self.evicts else 1.0
            if name is None and job.rows_dir is not None:
                Path(job.rows_dir).mkdir(parents=True, exist_ok=True)
                for i in range(len(job.requests)):
                    np.save(Path(job.rows_dir) / f"{i}.npy", np.zeros(1))
            on_result(result(kept, len(job.requests)))
            on_progress(len(job.requests))


def result(kept: float, num_requests: int) -> JobResult:
    num_evicted = round(1000 * (1 - kept))
    same = round(4 * kept)
    return JobResult(
        outputs=[[7] * same + [int(kept * 10)] * (4 - same)] * num_requests,
        logprobs=[[-4.0 + kept + 0.1 * i] * 4 for i in range(num_requests)],
        rows=[{"top_tokens": [1, 2, 3, 4]}] * num_requests,
        activity=Activity(
            num_compactions=int(num_evicted > 0),
            num_pages_freed=0,
            num_evicted_tokens=num_evicted,
            kv_bytes_per_request=kept * 2e6,
            kept_tokens=kept * 400,
            prompt_tokens=400,
        ),
        seconds=1.0,
    )


def evaluate(
    folder: Path, engine: Any, settings: EvalSettings = SETTINGS
) -> list[Outcome]:
    sides, settings = make_sides(settings, 6), replace(settings, out=folder)
    made = Evaluation(settings, sides, make_tasks(), Console(quiet=True), engine)
    return outcomes_of(made.results(), make_tasks(), seed=0)


def test_each_policy_has_one_engine_for_all_retentions(tmp_path: Path) -> None:
    engine = FakeEngine()
    outcomes = evaluate(tmp_path, engine)
    assert engine.jobs == [
        *[(None, None)] * 2,
        *[("pyramid", 0.5)] * 2,
        *[("pyramid", 0.3)] * 2,
    ]
    assert [outcome.side.asked for outcome in outcomes] == ["", "0.5", "0.3"]


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    first = evaluate(tmp_path, FakeEngine())
    engine = FakeEngine()
    again = evaluate(tmp_path, engine)
    assert engine.jobs == []
    assert [o.values for o in again] == [o.values for o in first]
    wider = replace(SETTINGS, retentions=(0.5, 0.3, 0.7))
    evaluate(tmp_path, engine, wider)
    assert engine.jobs == [("pyramid", 0.7)] * 2
    evaluate(tmp_path, engine, replace(SETTINGS, seed=1))
    assert len(engine.jobs) == 2 + 6


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="went away"):
        evaluate(tmp_path, FakeEngine(fail_after=3))
    engine = FakeEngine()
    evaluate(tmp_path, engine)
    assert engine.jobs == [("pyramid", 0.5), ("pyramid", 0.3), ("pyramid", 0.3)]


def test_lost_distributions_are_made_again(tmp_path: Path) -> None:
    evaluate(tmp_path, FakeEngine())
    (lost,) = (tmp_path / "full-cache").glob("*/1.npy")
    lost.unlink()
    engine = FakeEngine()
    evaluate(tmp_path, engine)
    assert engine.jobs == [(None, None)]


def test_a_policy_that_does_nothing_is_an_error() -> None:
    (_, (side, _)), (task, _) = make_sides(SETTINGS, 6), make_tasks()
    idle = result(1.0, 3)
    check_activity(side, task, result(0.5, 3))
    with pytest.raises(RuntimeError, match="pyramid should evict in task continuation"):
        check_activity(side, task, idle)
    short = agreement_task(windows(range(300), 100, 4, 2), 4)
    check_activity(side, short, idle)  # kept whole: below min_context
    (_, (full,)) = make_sides(replace(SETTINGS, retentions=(1.0,)), 6)
    check_activity(full, task, idle)


def test_runs_without_effect_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="should evict"):
        evaluate(tmp_path, FakeEngine(evicts=False))
    engine = FakeEngine()
    evaluate(tmp_path, engine)
    assert engine.jobs == [("pyramid", 0.5)] * 2 + [("pyramid", 0.3)] * 2


def test_losses_are_compared_in_pairs(tmp_path: Path) -> None:
    full, half, _ = evaluate(tmp_path, FakeEngine())
    summary = half.summary["continuation"]
    # Windows differ in loss, but all by the same amount.
    figures = list(summary["loss_difference"].values())
    assert figures == pytest.approx([0.5] * 3)
    assert summary["loss"]["high"] > summary["loss"]["low"]
    assert summary["loss_difference_share"]["value"] == pytest.approx(0.5 / 2.9)
    assert summary["kv_share"] == pytest.approx(0.5)
    assert half.summary["agreement"]["match_length"]["value"] == 2
    (table,) = tables([full, half], make_tasks())
    console = Console(width=140, record=True, file=StringIO())
    console.print(table)
    text = console.export_text()
    assert "+0.500" in text
    assert "50.0%" in text


def test_policies_of_one_name_are_told_apart() -> None:
    other = '{"name": "pyramid", "recent": 8}'
    settings = replace(SETTINGS, kv_policies=("pyramid", "snapkv", other))
    labels = [sides[0].label for sides in make_sides(settings, 6)]
    assert labels == ["full cache", "pyramid", "snapkv", "pyramid (2)"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration and a tokenizer, no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(folder, TINY_LLAMA["vocab_size"])
    return save_config(folder, LlamaConfig(**TINY_LLAMA))


def run_command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "120"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-policy", "pyramyd"], "valid policies are"),
        (["--retention", "1.5"], "retention"),
        (["--kv-policy", '{"capacity": 9}', "--retention", "0.5"], "capacity"),
        (["--retrieval", "needles"], "valid tasks are single_needle"),
        (["--retrieval", "none"], "nothing is asked"),
        (["--retrieval-tokens", "30"], "retrieval_tokens is 30"),
        (["--engine-args", "[1]"], "valid is a JSON object"),
        (["--kv-memory", "lots"], "memory is 'lots'"),
        (["--text", "TEXT", "--windows", "90"], "text.txt has"),
        (["--text", "TEXT", "--text-from", "0.9", "--text-to", "0.1"], "text_from is"),
    ],
)
def test_what_is_wrong_is_named_before_a_model_loads(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    text = tmp_path / "text.txt"
    text.write_text("All is quiet in the old town tonight. " * 300, encoding="utf-8")
    given = [str(text) if a == "TEXT" else a for a in arguments]
    out = ("--out", str(tmp_path / "out"))
    found = run_command("--model", model, *out, *given)
    assert found.exit_code == 2
    assert words in " ".join(found.stderr.split())


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pyramid-vllm\[plots\]"):
        check_matplotlib()


def test_an_engine_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the engine failed"):
        jobs.run_engine({"model": "m"}, [], lambda _: None, lambda _: None)


def test_the_process_sends_progress_and_a_result_for_each_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Progress counts the requests of all jobs."""
    two = [Job([Request([1, 2], 3)] * 2, 0.5), Job([Request([4], 1, [5], [6])])]
    llm_args = {"model": "m", "kv_policy": '{"name": "x"}'}

    def run_job(engine: str, job: Job, has_policy: bool, progress: Any) -> JobResult:
        assert (engine, has_policy) == ("engine of m", True)
        progress(len(job.requests))
        return result(0.5, len(job.requests))

    monkeypatch.setattr(
        runner, "make_engine", lambda args: f"engine of {args['model']}"
    )
    monkeypatch.setattr(runner, "run_job", run_job)
    sent: list[tuple[str, Any]] = []
    task = {"llm_args": llm_args, "jobs": [asdict(job) for job in two]}
    given = json.loads(json.dumps(task))
    runner.run_jobs(given, lambda *message: sent.append(message))
    assert [m for m in sent if m[0] == "done"] == [
        ("done", count) for count in (0, 2, 2, 3)
    ]
    results = [JobResult(**content) for kind, content in sent if kind == "result"]
    assert results == [result(0.5, 2), result(0.5, 1)]
    assert [Job(**job) for job in given["jobs"]] == two
