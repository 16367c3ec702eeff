"""Runs every side over every task, and keeps what is already there."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import pyramid_vllm
from pyramid_vllm.compat import installed_vllm_version
from pyramid_vllm.tools.quality.jobs import EngineTask, Job, JobResult
from pyramid_vllm.tools.quality.processes import run_engine
from pyramid_vllm.tools.quality.settings import EvalSettings, Side
from pyramid_vllm.tools.quality.store import RunStore, digest
from pyramid_vllm.tools.quality.tasks import Task, Values

RunEngine = Callable[
    [EngineTask, Callable[[JobResult], None], Callable[[int], None]], None
]


@dataclass(frozen=True)
class Outcome:
    """One side's results, by the tasks' names."""

    side: Side
    results: dict[str, JobResult]
    values: dict[str, Values]


class Evaluation:
    """All runs of one set of options.

    Args:
        settings: the options.
        sides: by engine, the full cache first.
        tasks: what each side runs.
        folder: where results are kept.
        console: hears of progress.
        run: runs one engine.
    """

    def __init__(
        self,
        settings: EvalSettings,
        sides: list[list[Side]],
        tasks: list[Task],
        folder: Path,
        console: Console,
        run: RunEngine = run_engine,
    ) -> None:
        self._settings = settings
        self._sides = sides
        self._tasks = tasks
        self._store = RunStore(folder)
        self._console = console
        self._run = run
        self._longest = max(_length(task) for task in tasks)
        self._digests = {
            task.name: digest([asdict(request) for request in task.requests])
            for task in tasks
        }

    def outcomes(self) -> list[Outcome]:
        """Run what is missing and grade everything.

        Raises:
            RuntimeError: an engine failed, or a policy did nothing.
        """
        columns = (
            TextColumn("{task.description:<32}"),
            BarColumn(),
            MofNCompleteColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            for sides in self._sides:
                self._run_engine(sides, progress)
        return [self._outcome(side) for sides in self._sides for side in sides]

    def identity(self, side: Side, task: Task) -> dict[str, Any]:
        """All that a run's result depends on."""
        settings = self._settings
        return {
            "model": settings.model,
            "policy": side.policy,
            "retention": side.retention,
            "task": task.name,
            "requests": self._digests[task.name],
            "dtype": settings.dtype,
            "seed": settings.seed,
            "kv_bytes": settings.kv_bytes,
            "max_num_batched_tokens": self._chunk,
            "engine_args": settings.engine_args,
            "versions": {
                "vllm": installed_vllm_version(),
                "pyramid_vllm": pyramid_vllm.__version__,
            },
        }

    @property
    def _chunk(self) -> int:
        # vLLM wants at least as many as a prompt has, or sequences run.
        return self._settings.max_num_batched_tokens or max(2048, self._longest)

    def _rows_dir(self, task: Task) -> Path | None:
        if task.kind != "continuation":
            return None
        return self._store.rows_dir(self.identity(self._sides[0][0], task))

    def _is_done(self, side: Side, task: Task) -> bool:
        if self._store.load(self.identity(side, task)) is None:
            return False
        folder = self._rows_dir(task)
        if side.config is not None or folder is None:
            return True
        return all((folder / f"{i}.npy").is_file() for i in range(len(task.requests)))

    def _run_engine(self, sides: list[Side], progress: Progress) -> None:
        """Run the missing jobs of one engine."""
        label = sides[0].label
        pairs = [(side, task) for side in sides for task in self._tasks]
        missing = [pair for pair in pairs if not self._is_done(*pair)]
        if len(missing) < len(pairs):
            self._console.print(
                f"{label}: {len(pairs) - len(missing)} of {len(pairs)} runs are there"
            )
        if not missing:
            return
        engine_task = self._engine_task(sides[0], missing)
        total = sum(len(job.requests) for job in engine_task.jobs)
        bar = progress.add_task(f"{label}: loading", total=total)
        waiting = iter(missing)

        def save(result: JobResult) -> None:
            side, task = next(waiting)
            check_activity(side, task, result)
            self._store.save(self.identity(side, task), result)

        def advance(done: int) -> None:
            progress.update(bar, completed=done, description=label)

        self._run(engine_task, save, advance)

    def _engine_task(self, side: Side, missing: list[tuple[Side, Task]]) -> EngineTask:
        settings = self._settings
        jobs = []
        for one, task in missing:
            folder = self._rows_dir(task)
            rows_dir = None if folder is None else str(folder)
            jobs.append(Job(task.requests, one.retention, rows_dir))
        return EngineTask(
            model=settings.model,
            kv_policy=None if side.config is None else side.config.model_dump_json(),
            dtype=settings.dtype,
            kv_bytes=settings.kv_bytes,
            max_model_len=self._longest,
            max_num_batched_tokens=self._chunk,
            seed=settings.seed,
            engine_args=settings.engine_args,
            jobs=jobs,
        )

    def _outcome(self, side: Side) -> Outcome:
        results, values = {}, {}
        for task in self._tasks:
            result = self._store.load(self.identity(side, task))
            full = self._store.load(self.identity(self._sides[0][0], task))
            assert result is not None
            assert full is not None
            results[task.name] = result
            values[task.name] = task.grade(result, full)
        return Outcome(side, results, values)


def check_activity(side: Side, task: Task, result: JobResult) -> None:
    """A policy has to act where its counts say so.

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


def _length(task: Task) -> int:
    return max(len(r.prompt_ids) + r.max_tokens for r in task.requests)
