"""What the engine's process is given, and gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyramid_vllm.tools.quality.activity import Activity


@dataclass(frozen=True)
class Request:
    """One prompt and how its output ends."""

    prompt_ids: list[int]
    max_tokens: int
    forced: list[int] | None = None
    """Its output, if that is given."""
    stop_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Requests that run in one batch under one policy."""

    requests: list[Request]
    retention: float | None = None
    """Asked for by each request, instead of the policy's own."""
    rows_dir: str | None = None
    """Where the full cache's distributions are: stock writes, a policy compares."""


@dataclass(frozen=True)
class EngineTask:
    """One engine, and the jobs that it runs."""

    model: str
    kv_policy: str | None
    """As JSON; None is stock vLLM."""
    dtype: str
    kv_bytes: int
    max_model_len: int
    max_num_batched_tokens: int
    seed: int
    engine_args: dict[str, Any]
    jobs: list[Job]

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> "EngineTask":
        """From JSON."""
        jobs = [
            Job(**(job | {"requests": [Request(**r) for r in job["requests"]]}))
            for job in settings["jobs"]
        ]
        return cls(**{**settings, "jobs": jobs})


@dataclass(frozen=True)
class JobResult:
    """Of each request, in order; and of all."""

    outputs: list[list[int]]
    logprobs: list[list[float]]
    """Raw log-probabilities of forced tokens."""
    rows: list[dict[str, list[float]]]
    """``top_tokens`` and, of a policy, ``divergences`` of forced positions."""
    activity: Activity
    seconds: float

    @classmethod
    def read(cls, result: Mapping[str, Any]) -> "JobResult":
        """From JSON."""
        return cls(**{**result, "activity": Activity(**result["activity"])})
