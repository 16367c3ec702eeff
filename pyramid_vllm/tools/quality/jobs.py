"""What the engine's process is given, and gives back."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter

from pyramid_vllm.tools.quality.activity import Activity

_Kind = TypeVar("_Kind")


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


def read(kind: type[_Kind], content: Any) -> _Kind:
    """One of these classes, from JSON."""
    return TypeAdapter(kind).validate_python(content)
