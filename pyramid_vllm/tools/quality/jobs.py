"""The task and the results of an engine's process."""

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
class EngineTask:
    """One engine, and the jobs that it runs."""

    model: str
    kv_policy: str | None
    """JSON; None: stock vLLM."""
    dtype: str
    kv_bytes: int
    max_model_len: int
    max_num_batched_tokens: int
    seed: int
    engine_args: dict[str, Any]
    jobs: list[Job]


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


def read(kind: type[_Kind], content: Any) -> _Kind:
    """One of these classes, from JSON."""
    return TypeAdapter(kind).validate_python(content)
