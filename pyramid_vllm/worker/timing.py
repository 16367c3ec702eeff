"""How long a worker scores, selects and compacts, for the metrics alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)

from pyramid_vllm.stats import TIMES_ATTRIBUTE


class CompactionTimer(Protocol):
    """Adds up parts of a step."""

    def part(self) -> AbstractContextManager[None]:
        """Around what is to be timed."""

    def end_step(self, has_compacted: bool) -> None:
        """Close a step; one that did not compact counts for nothing."""

    def take(self) -> tuple[float, ...]:
        """Seconds of the steps whose time is known by now, each once."""


class HostTimer:
    """For work that is done when its call returns."""

    def __init__(self) -> None:
        self._step = 0.0
        self._done: list[float] = []

    @contextmanager
    def part(self) -> Iterator[None]:
        """Around what is to be timed."""
        start = time.perf_counter()
        yield
        self._step += time.perf_counter() - start

    def end_step(self, has_compacted: bool) -> None:
        """Close a step."""
        if has_compacted:
            self._done.append(self._step)
        self._step = 0.0

    def take(self) -> tuple[float, ...]:
        """Seconds of the steps that are over."""
        done, self._done = tuple(self._done), []
        return done


class DeviceTimer:
    """For launches: events on the stream, read once they have happened.

    Nothing waits for the device: a step's time goes out with a later step.
    """

    def __init__(self) -> None:
        self._step: list[tuple[Any, Any]] = []
        self._waiting: deque[list[tuple[Any, Any]]] = deque()

    @contextmanager
    def part(self) -> Iterator[None]:
        """Around what is to be timed."""
        start, end = self._event(), self._event()
        start.record()
        yield
        end.record()
        self._step.append((start, end))

    @staticmethod
    def _event() -> Any:
        event: Any = torch.cuda.Event
        return event(enable_timing=True)

    def end_step(self, has_compacted: bool) -> None:
        """Close a step."""
        if has_compacted and self._step:
            self._waiting.append(self._step)
        self._step = []

    def take(self) -> tuple[float, ...]:
        """Seconds of the steps that the device is through with."""
        done = []
        while self._waiting and self._waiting[0][-1][1].query():
            parts = self._waiting.popleft()
            done.append(sum(start.elapsed_time(end) for start, end in parts) / 1e3)
        return tuple(done)


class _AsyncOutput(AsyncModelRunnerOutput):
    """A step's output that is not there yet, with times that are."""

    def __init__(
        self,
        output: AsyncModelRunnerOutput,
        times: tuple[float, ...],
        check: Callable[[], None] | None,
    ):
        self._output, self._times, self._check = output, times, check

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the output, and with it for all that the device did before it."""
        output = self._output.get_output()
        if self._check is not None:
            self._check()
        setattr(output, TIMES_ATTRIBUTE, self._times)
        return output

    def get_kv_connector_output(self) -> Any:
        """Asked for from vLLM 0.33 on: what is saved of a step that fails."""
        output: Any = self._output
        return output.get_kv_connector_output()


def with_times(
    output: Any, timer: CompactionTimer, check: Callable[[], None] | None = None
) -> Any:
    """A step's output with the compaction times that are known by now.

    Args:
        output: of the runner; None where a later call returns it.
        timer: keeps its times where there is no output that could carry them.
        check: raises if the device found the step at fault. Called once the output is
            there, before its tokens leave the worker.
    """
    if output is None or output is EMPTY_MODEL_RUNNER_OUTPUT:
        return output
    times = timer.take()
    if not times and check is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _AsyncOutput(output, times, check)
    if check is not None:
        check()
    setattr(output, TIMES_ATTRIBUTE, times)
    return output
