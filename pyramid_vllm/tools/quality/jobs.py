"""The jobs and the results of an engine's process, which are read from JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, field
from typing import Any

from pydantic.dataclasses import dataclass

from pyramid_vllm.tools.engine_process import PASSIVE, run_job
from pyramid_vllm.tools.quality.activity import Activity


@dataclass(frozen=True)
class Request:
    """One prompt and how its output ends."""

    prompt_ids: list[int]
    max_tokens: int
    forced: list[int] | None = None
    """The output, where it is given."""
    stop_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Requests that run in one batch under one policy."""

    requests: list[Request]
    retention: float | None = None
    """The retention that each request names; None: the policy's."""
    rows_dir: str | None = None
    """Folder of the full cache's distributions: stock vLLM writes, policies compare."""


@dataclass(frozen=True)
class JobResult:
    """Results of each request, in order, and of the whole batch."""

    outputs: list[list[int]]
    logprobs: list[list[float]]
    """Raw log-probabilities of forced tokens."""
    rows: list[dict[str, list[float]]]
    """``top_tokens`` of forced positions; ``divergences`` too if there is a policy."""
    activity: Activity
    seconds: float


def run_engine(
    llm_args: dict[str, Any],
    jobs: Sequence[Job],
    on_result: Callable[[JobResult], None],
    on_progress: Callable[[int], None],
) -> None:
    """Run jobs on one engine, in a process of its own.

    Args:
        llm_args: of ``LLM``, as JSON can hold them.
        jobs: what the engine runs.
        on_result: gets every job's result as soon as it is there, in order.
        on_progress: gets the number of finished requests.

    Raises:
        KVPolicyError: the engine refused the policy.
        RuntimeError: the process failed; the message ends with its last lines.
    """
    run_job(
        "pyramid_vllm.tools.quality.runner:run_jobs",
        {"llm_args": llm_args, "jobs": [asdict(job) for job in jobs]},
        lambda result: on_result(JobResult(**result)),
        on_progress,
        PASSIVE,
        len(jobs),
    )
