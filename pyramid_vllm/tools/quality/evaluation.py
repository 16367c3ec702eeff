"""Runs every side over every task, and keeps what is already there."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import pyramid_vllm
from pyramid_vllm.compat import installed_vllm_version
from pyramid_vllm.tools.figures import bars
from pyramid_vllm.tools.quality.jobs import Job, JobResult, run_engine
from pyramid_vllm.tools.quality.settings import EvalSettings, Side
from pyramid_vllm.tools.quality.tasks import Task
from pyramid_vllm.tools.store import Store, fingerprint

#: One side's results, by the tasks' names.
Results = dict[str, JobResult]


class Evaluation:
    """All runs of one set of options.

    Args:
        settings: the options.
        sides: sides by engine, the full cache first.
        tasks: what every side does.
        console: where progress is shown.
        run: ``run_engine``, unless there is no engine.
    """

    def __init__(
        self,
        settings: EvalSettings,
        sides: Sequence[list[Side]],
        tasks: Sequence[Task],
        console: Console,
        run: Callable[..., None] = run_engine,
    ) -> None:
        self.sides, self.tasks, self.run = sides, tasks, run
        self.console, self.folder = console, settings.out
        self._store = Store(self.folder / "runs")
        requests = [request for task in tasks for request in task.requests]
        self._longest = max(len(r.prompt_ids) + r.max_tokens for r in requests)
        self._llm_args: dict[str, Any] = {
            "model": settings.model,
            "dtype": settings.dtype,
            "seed": settings.seed,
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": settings.kv_bytes,
            # vLLM requires at least a prompt's tokens, and the number of sequences.
            "max_num_batched_tokens": settings.max_num_batched_tokens
            or max(2048, self._longest),
        } | settings.engine_args

    def results(self) -> list[tuple[Side, Results]]:
        """Run what is missing; all results of every side.

        Raises:
            RuntimeError: an engine failed, or a policy did nothing.
        """
        with bars(self.console, 32) as progress:
            for sides in self.sides:
                self._run_engine(sides, progress)
        return [
            (side, {task.name: self._result(side, task) for task in self.tasks})
            for sides in self.sides
            for side in sides
        ]

    def _result(self, side: Side, task: Task) -> JobResult:
        content = self._store.load(self._identity(side, task))
        assert content is not None
        return JobResult(**content["result"])

    def _identity(self, side: Side, task: Task) -> dict[str, Any]:
        """All that a run's result depends on."""
        return {
            **self._llm_args,
            "policy": side.policy,
            "retention": side.retention,
            "task": task.name,
            "requests": task.digest,
            "versions": {
                "vllm": installed_vllm_version(),
                "pyramid_vllm": pyramid_vllm.__version__,
            },
        }

    def _rows_dir(self, task: Task) -> Path | None:
        """Folder of the full cache's distributions; None: the task has none."""
        if task.kind != "continuation":
            return None
        identity = self._identity(self.sides[0][0], task)
        return self.folder / "full-cache" / fingerprint(identity)

    def _is_done(self, side: Side, task: Task) -> bool:
        if self._store.load(self._identity(side, task)) is None:
            return False
        folder = self._rows_dir(task)
        if side.config is not None or folder is None:
            return True
        return len(list(folder.glob("*.npy"))) == len(task.requests)

    def _run_engine(self, sides: list[Side], progress: Progress) -> None:
        """Run the missing jobs of one engine."""
        label, policy = sides[0].label, sides[0].config
        pairs = [(side, task) for side in sides for task in self.tasks]
        missing = [pair for pair in pairs if not self._is_done(*pair)]
        if len(missing) < len(pairs):
            self.console.print(
                f"{label}: {len(pairs) - len(missing)} of {len(pairs)} runs are there"
            )
        if not missing:
            return
        jobs = []
        for side, task in missing:
            folder = self._rows_dir(task)
            rows = None if folder is None else str(folder)
            jobs.append(Job(task.requests, side.retention, rows))
        total = sum(len(job.requests) for job in jobs)
        bar = progress.add_task(f"{label}: loading", total=total)
        waiting = iter(missing)

        def save(result: JobResult) -> None:
            side, task = next(waiting)
            check_activity(side, task, result)
            identity = self._identity(side, task)
            content = {"identity": identity, "result": asdict(result)}
            self._store.save(identity, content)

        def advance(done: int) -> None:
            progress.update(bar, completed=done, description=label)

        kv_policy = None if policy is None else policy.model_dump_json()
        llm_args = {"max_model_len": self._longest} | self._llm_args
        self.run(llm_args | {"kv_policy": kv_policy}, jobs, save, advance)


def check_activity(side: Side, task: Task, result: JobResult) -> None:
    """Check that a policy acted where its counts say so.

    Raises:
        RuntimeError: it did not.
    """
    activity = result.activity
    acted = activity.num_compactions or activity.num_evicted_tokens
    if side.should_evict(task) and not acted:
        raise RuntimeError(
            f"policy {side.label} should evict in task {task.name}: it compacted no "
            "request and pruned no row"
        )
