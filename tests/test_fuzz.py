"""Random schedules: whatever happens to a request, no page leaks and no request reads
another's tokens."""

import functools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from tests.conftest import BACKEND
from tests.fuzzing import PageWorker
from tests.scheduling import (
    Driver,
    free_pages,
    make_config,
    make_request,
    scheduler_from,
)

BASE: dict[str, Any] = {
    "base": "pyramid-by-depth",
    "recent": 16,
    "min_context": 32,
    "tiers": 3,
    "steepness": 0.8,
}
POLICIES: dict[str, dict[str, Any]] = {
    "pyramid": BASE,
    "tight": BASE | {"retention": 0.2, "growth_reserve": 0},
    "chunk": BASE | {"evict": "chunk"},
    "pruned": BASE | {"prune_from": 0, "growth_reserve": "all"},
    "groups": BASE | {"exceed_length_to_compress": 8, "growth_reserve": 0},
    "pruned groups": BASE | {"prune_from": 2, "exceed_length_to_compress": 8},
    # Tiers of one and of two layers: each has several KV cache groups.
    "uneven": BASE | {"tiers": 4, "growth_reserve": 0},
    "segments": BASE
    | {"evict": "segment", "segment": 64, "scorer": "key_diff", "recent": 16},
    "tight segments": BASE
    | {
        "evict": "segment",
        "segment": 96,
        "scorer": "key_norm",
        "recent": 32,
        "retention": 0.3,
        "growth_reserve": 0,
    },
    "streaming": {"base": "streaming", "recent": 8, "min_context": 16, "tiers": 2},
}
#: What requests may ask for beside the engine's own policy.
WISHES: list[dict[str, Any] | None] = [
    {"kv_policy": "none"},
    {"kv_retention": 0.7},
    {"kv_retention": 0.25},
    {"kv_policy": "streaming"},
    {"kv_policy": "knorm"},
]

if BACKEND is None:
    WORKER, NUM_SCHEDULES = PageWorker, 1000
else:  # the V2 runner's tables, whose kernels are interpreted
    from tests.fuzzing_v2 import V2PageWorker

    WORKER, NUM_SCHEDULES = V2PageWorker, 6

#: What all schedules together have met.
MET: Counter[str] = Counter()


@functools.cache
def config_of(model: str, policy: str, chunk: int, order: str, in_flight: bool) -> Any:
    return make_config(
        model,
        POLICIES[policy],
        max_num_batched_tokens=chunk,
        scheduling_policy=order,
        async_scheduling=in_flight,
        enable_prefix_caching=None,
    )


class Schedule:
    """One run of a scheduler and a worker: arrivals, aborts and resets at random."""

    def __init__(
        self, model: str, policy: str, pool: int, order: str, depth: int, seed: int
    ) -> None:
        self._rng = rng = random.Random(seed)
        chunk = rng.choice([48, 128, 512])
        config = config_of(model, policy, chunk, order, depth > 1)
        self.scheduler = scheduler_from(config, pool)
        self._driver = Driver(self.scheduler, depth, WORKER(self.scheduler, rng))
        self._total = free_pages(self.scheduler)
        self._requests: list[Any] = []

    def run(self) -> None:
        """Run everything to its end, and check what must hold then."""
        rng, scheduler = self._rng, self.scheduler
        num_requests = rng.randint(4, 12)
        while len(self._requests) < num_requests:
            for _ in range(rng.randint(0, 3)):
                self._arrive()
            self._driver.step()
            if rng.random() < 0.15 and scheduler.requests:
                self._abort()
            if rng.random() < 0.02:
                scheduler.reset_prefix_cache(reset_running_requests=True)
        self._driver.run()
        scheduler.check_integrity()
        assert free_pages(scheduler) == self._total
        assert len(scheduler.tier_lengths) == 0
        self._record()

    def _arrive(self) -> None:
        rng = self._rng
        prompt = rng.randint(1, 260)
        request = make_request(
            str(len(self._requests)),
            prompt,
            rng.randint(1, 90),
            rng.randint(0, 3),
            shared=rng.choice([0, prompt // 2, prompt, 160]),
            extra_args=rng.choice([None, None, *WISHES]),
        )
        self._requests.append(request)
        self.scheduler.add_request(request)

    def _abort(self) -> None:
        """Abort requests, also those whose step is planned and has not run."""
        victim = self._rng.choice(list(self.scheduler.requests))
        self.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
        self.scheduler.check_integrity()
        MET["aborts"] += 1

    def _record(self) -> None:
        counters = self.scheduler.kv_counters
        MET["schedules"] += 1
        MET["requests"] += len(self._requests)
        MET["preemptions"] += sum(r.num_preemptions for r in self._requests)
        MET["compactions"] += counters.num_compactions
        MET["groups"] += counters.num_groups
        MET["refused"] += counters.num_refused_requests
        plans = self._driver.plans
        windows = [window for plan in plans for window in plan.windows]
        MET["gathered"] += sum(window.pages is not None for window in windows)
        MET["pruned"] += sum(plan.prunes for plan in plans)
        MET["hits"] += self._driver.worker.num_shared_reads
        MET["segments"] += counters.num_segments
        MET["shared segments"] += counters.num_shared_segments
        MET["segment hits"] += self._driver.worker.num_segment_hits
        MET["waits"] += counters.num_waits
        MET["wishes"] += sum(
            bool(r.sampling_params and r.sampling_params.extra_args)
            for r in self._requests
        )


def schedules(count: int) -> Any:
    """Draw ``count`` schedules, the same ones every time."""

    def decorate(function: Any) -> Any:
        drawn = given(
            policy=st.sampled_from(sorted(POLICIES)),
            pool=st.sampled_from([34, 40, 60]),
            order=st.sampled_from(["fcfs", "priority"]),
            depth=st.sampled_from([1, 2]),
            seed=st.integers(0, 2**32),
        )(function)
        return settings(
            max_examples=count,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture],
        )(drawn)

    return decorate


@schedules(NUM_SCHEDULES)
@example(policy="pyramid", pool=34, order="priority", depth=2, seed=0)
def test_random_schedules(
    tiny_llama: str, policy: str, pool: int, order: str, depth: int, seed: int
) -> None:
    """After every step: free and held pages are all pages, and shared ones read-only;
    the scheduler's counts are the worker's; every read finds its own tokens."""
    Schedule(tiny_llama, policy, pool, order, depth, seed).run()


def test_the_schedules_met_what_they_are_for() -> None:
    """This runs after the schedules, which prove little if nothing happened in them."""
    assert MET["schedules"] >= NUM_SCHEDULES
    for what in (
        "preemptions",
        "aborts",
        "compactions",
        "gathered",
        "groups",
        "pruned",
        "hits",
        "wishes",
    ):
        assert MET[what] > NUM_SCHEDULES // 10, (what, MET)
    if BACKEND is None:  # few schedules are of their policies
        for what in ("segments", "shared segments", "segment hits", "waits"):
            assert MET[what] > NUM_SCHEDULES // 100, (what, MET)


@pytest.mark.long
@schedules(20_000)
def test_many_more_schedules(
    tiny_llama: str, policy: str, pool: int, order: str, depth: int, seed: int
) -> None:
    """The same law, for as long as one likes."""
    Schedule(tiny_llama, policy, pool, order, depth, seed).run()
