"""The simulation: real ``schedule()`` and ``update_from_output()``, a clock between."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyramid_vllm.plan import plan_of
from pyramid_vllm.tools.simulate.clock import StepWork, WorkModel, step_seconds
from pyramid_vllm.tools.simulate.device import Device
from pyramid_vllm.tools.simulate.engine import SAMPLED_TOKEN, SimulatedEngine, sampled
from pyramid_vllm.tools.simulate.loads import Load, piece_tokens
from pyramid_vllm.tools.simulate.pages import PageCount, count_pages, saved_tokens

#: Steps from one count of pages to the next.
_PAGES_EVERY = 64


@dataclass
class RequestRecord:
    """Times and counts of a request. Times are in seconds since the start."""

    num_prompt_tokens: int
    num_outputs: int
    arrival: float
    first_token: float = -1.0
    finish: float = -1.0
    num_received: int = 0
    """Tokens of its answer so far."""
    num_cached_tokens: int = 0
    """Prompt tokens in the prefix cache when it was first scheduled."""


@dataclass
class StepRecord:
    """Times and counts of a step."""

    end: float
    """Seconds since the start, when its tokens were there."""
    seconds: float
    """Seconds of the device."""
    num_running: int
    cpu_s: float


@dataclass
class Simulation:
    """One side under one load, from an empty cache on; and what became of it.

    Raises:
        ValueError: a request is longer than the engine allows.
    """

    name: str
    """The side's policy."""
    engine: SimulatedEngine
    device: Device
    load: Load
    cpu_time: bool = True
    """Whether the scheduler's own time counts."""
    cascade: bool = False
    """Whether pages that several sequences share are read once a step."""
    keep_works: bool = False
    progress: Callable[[int], None] = lambda done: None
    """Called with the number of finished requests."""

    requests: dict[str, RequestRecord] = field(default_factory=dict, init=False)
    steps: list[StepRecord] = field(default_factory=list, init=False)
    works: list[StepWork] = field(default_factory=list, init=False)
    """The work of each step, if ``keep_works`` is set."""
    pages: list[PageCount] = field(default_factory=list, init=False)
    num_preemptions: int = field(default=0, init=False)
    num_prompt_tokens_computed: int = field(default=0, init=False)
    num_compactions: int = field(default=0, init=False)
    wall_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        longest, valid = self.load.longest, self.engine.max_model_len
        if longest > valid:
            raise ValueError(
                f"the longest request has {longest} tokens: valid is up to "
                f"--max-model-len, {valid}"
            )
        self.engine.restart()
        self._scheduler: Any = self.engine.scheduler
        self._work = _work_model(self.engine)
        self._depth = 2 if self.engine.settings.async_scheduling else 1
        # The host's time, and when the device has finished all its steps.
        self._now = self._device_free = 0.0
        self._flying: deque[tuple[Any, Any, float]] = deque()
        self._events: list[tuple[float, int, int]] = []
        """When the next turn of a session arrives: time, session, turn."""
        self._tokens: dict[int, list[int]] = {}
        self._num_finished = 0
        # Sessions from this one on start when others end.
        num, clients = len(self.load.sessions), self.load.num_clients
        self._next_session = min(clients or num, num)
        for index, session in enumerate(self.load.sessions[: self._next_session]):
            arrival = session.arrival if clients is None else 0.0
            heapq.heappush(self._events, (arrival, index, 0))

    def run(self) -> Simulation:
        """Serve the load to its end.

        Raises:
            RuntimeError: the scheduler stands still with requests waiting, or ended
                one early.
        """
        start = time.perf_counter()
        scheduler, stuck = self._scheduler, 0
        while True:
            self._admit()
            if scheduler.has_requests():
                scheduled = self._schedule()
                stuck = 0 if scheduled or self._flying else stuck + 1
                if stuck > 3 and not self._events:
                    raise RuntimeError("the scheduler schedules nothing of what waits")
                if scheduled and len(self._flying) < self._depth:
                    continue
            if self._flying:
                self._land()
            elif self._events:
                self._now = max(self._now, self._events[0][0])
            else:
                break
        self.wall_s = time.perf_counter() - start
        counters = getattr(scheduler, "kv_counters", None)
        if counters is not None:
            self.num_compactions = counters.num_compactions
        return self

    def _admit(self) -> None:
        """Hand the scheduler what has arrived by now."""
        while self._events and self._events[0][0] <= self._now:
            arrival, index, number = heapq.heappop(self._events)
            turn = self.load.sessions[index].turns[number]
            tokens = self._tokens.setdefault(index, [])
            for piece in turn.pieces:
                tokens += piece_tokens(piece)
            name = f"{index}.{number}"
            self.requests[name] = RequestRecord(len(tokens), turn.num_outputs, arrival)
            self._scheduler.add_request(
                self.engine.request(name, list(tokens), turn.num_outputs, arrival)
            )

    def _ended(self, name: str) -> None:
        """A request's last token is there: its session goes on, or the next starts."""
        self._num_finished += 1
        index, number = map(int, name.split("."))
        turns = self.load.sessions[index].turns
        if number + 1 < len(turns):
            self._tokens[index] += [SAMPLED_TOKEN] * turns[number].num_outputs
            at = self._now + turns[number + 1].wait
            heapq.heappush(self._events, (at, index, number + 1))
            return
        del self._tokens[index]
        if self._next_session < len(self.load.sessions):
            heapq.heappush(self._events, (self._now, self._next_session, 0))
            self._next_session += 1

    def _schedule(self) -> bool:
        """Schedule a step and give it to the device; False: it is empty."""
        scheduler = self._scheduler
        # Time of this thread alone: other work on the machine does not count.
        start = time.thread_time()
        output = scheduler.schedule()
        cpu_s = time.thread_time() - start
        self.num_preemptions += len(output.preempted_req_ids or ())
        for new in output.scheduled_new_reqs:
            self.requests[new.req_id].num_cached_tokens = new.num_computed_tokens
        if self.cpu_time:
            self._now += cpu_s
        result = sampled(scheduler, output)
        num_rows = output.total_num_scheduled_tokens
        seconds = self._device_seconds(output) if num_rows else 0.0
        self._device_free = max(self._now, self._device_free) + seconds
        self._flying.append((output, result, self._device_free))
        if num_rows:
            self.steps.append(
                StepRecord(self._device_free, seconds, len(scheduler.running), cpu_s)
            )
            if len(self.steps) % _PAGES_EVERY == 1:
                self.pages.append(count_pages(scheduler, self._device_free))
        return bool(num_rows)

    def _device_seconds(self, output: Any) -> float:
        requests, plan = self._scheduler.requests, plan_of(output)
        scheduled = output.num_scheduled_tokens
        of_step = [requests[req_id] for req_id in scheduled]
        rows = np.fromiter(scheduled.values(), np.int64, len(scheduled))
        after = np.array([r.num_computed_tokens for r in of_step], np.int64)
        prompts = np.array([r.num_prompt_tokens for r in of_step], np.int64)
        before = after - rows
        computed = np.maximum(0, np.minimum(after, prompts) - before)
        self.num_prompt_tokens_computed += int(computed.sum())
        saved = saved_tokens(self._scheduler, scheduled) if self.cascade else 0
        work = self._work.step(before, rows, plan, saved, list(scheduled))
        if self.keep_works:
            self.works.append(work)
        return float(step_seconds(work, self.engine.settings.model, self.device))

    def _land(self) -> None:
        """Wait for the oldest step and take its tokens."""
        output, result, done = self._flying.popleft()
        self._now = max(self._now, done)
        start = time.thread_time()
        outputs = self._scheduler.update_from_output(output, result)
        cpu_s = time.thread_time() - start
        if self.steps:
            self.steps[-1].cpu_s += cpu_s
        # Clients get their tokens before the host continues.
        for of_client in outputs.values():
            for news in of_client.outputs:
                self._take(news)
        if self.cpu_time:
            self._now += cpu_s
        self.progress(self._num_finished)

    def _take(self, news: Any) -> None:
        record = self.requests[news.request_id]
        if record.first_token < 0 and news.new_token_ids:
            record.first_token = self._now
        record.num_received += len(news.new_token_ids)
        if news.finish_reason is None:
            return
        if record.num_received < record.num_outputs:
            raise RuntimeError(
                f"a request of {record.num_prompt_tokens} + {record.num_outputs} "
                f"tokens ended after {record.num_received} of its answer, finish "
                f"reason '{news.finish_reason}': the KV memory cannot hold it"
            )
        record.finish = self._now
        self._ended(news.request_id)


def _work_model(engine: SimulatedEngine) -> WorkModel:
    model = engine.settings.model
    rule = getattr(engine.scheduler, "kv_rule", None)
    if rule is not None:
        return WorkModel(model, rule.layout.sizes, {rule.config.name: rule.config})
    return WorkModel(model, (model.windows.count(None),), {})
