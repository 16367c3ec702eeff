"""The tasks of an evaluation: their requests, and how outputs are graded."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from pyramid_vllm.tools.quality.jobs import JobResult, Request
from pyramid_vllm.tools.quality.retrieval import Sample, score
from pyramid_vllm.tools.quality.texts import Window
from pyramid_vllm.tools.store import fingerprint

#: Values by name, one for each request.
Values = dict[str, list[float]]


@dataclass(frozen=True)
class Task:
    """A batch of requests and the figures that come out of it."""

    name: str
    kind: str
    """``continuation``, ``agreement`` or ``retrieval``."""
    requests: list[Request]
    grade: Callable[[JobResult, JobResult], Values]
    """Called with the results of a policy and of the full cache."""
    cells: tuple[dict[str, Any], ...] = ()
    """Task, length and depth of each request, where they differ."""

    @cached_property
    def digest(self) -> str:
        """A short name for the requests."""
        return fingerprint([asdict(request) for request in self.requests])


def continuation_task(windows: Sequence[Window]) -> Task:
    """Losses of the tokens that follow each prefix."""
    requests = [Request(prefix, len(target), target) for prefix, target in windows]
    return Task("continuation", "continuation", requests, _grade_continuation)


def _grade_continuation(result: JobResult, full: JobResult) -> Values:
    values: Values = {"loss": [-fmean(logprobs) for logprobs in result.logprobs]}
    if not result.rows:
        return values
    values["top_agreement"] = [
        fmean(
            a == b for a, b in zip(ours["top_tokens"], row["top_tokens"], strict=True)
        )
        for ours, row in zip(result.rows, full.rows, strict=True)
    ]
    # The full cache does not diverge from itself.
    values["divergence"] = [fmean(r.get("divergences", [0.0])) for r in result.rows]
    return values


def agreement_task(windows: Sequence[Window], num_tokens: int) -> Task:
    """Greedy outputs after each prefix."""

    def grade(result: JobResult, full: JobResult) -> Values:
        lengths = map(match_length, result.outputs, full.outputs)
        return {"match_length": [float(length) for length in lengths]}

    requests = [Request(prefix, num_tokens) for prefix, _ in windows]
    return Task("agreement", "agreement", requests, grade)


def match_length(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens up to the first difference."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    shortest = min(len(ours), len(theirs))
    return next((i for i, (a, b) in pairs if a != b), shortest)


def retrieval_task(
    samples: Sequence[Sample], tokenizer: Any, stop_ids: list[int]
) -> Task:
    """Samples of one task and length, of all depths."""
    requests = [Request(s.prompt_ids, s.max_tokens, stop_ids=stop_ids) for s in samples]

    def grade(result: JobResult, full: JobResult) -> Values:
        texts = tokenizer.batch_decode(result.outputs, skip_special_tokens=True)
        return {"score": list(map(score, samples, texts))}

    cells = tuple(
        {"task": s.task, "num_tokens": s.num_tokens, "depth": s.depth} for s in samples
    )
    name = f"{samples[0].task} {samples[0].num_tokens}"
    return Task(name, "retrieval", requests, grade, cells)
