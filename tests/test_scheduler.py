"""Counts and pages, step by step, without a model."""

import random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from pyramid_vllm.policy import num_pages
from pyramid_vllm.scheduler import PyramidScheduler
from pyramid_vllm.scheduler.block_manager import TierBlockManager
from tests.scheduling import (
    BLOCK_SIZE,
    Driver,
    free_pages,
    held_pages,
    make_request,
    make_scheduler,
)

SMALL: dict[str, Any] = {
    "base": "pyramid-by-depth",
    "recent": 16,
    "min_context": 32,
    "tiers": 3,
}


def rule_pages(
    scheduler: PyramidScheduler, prompt: int, computed: int
) -> dict[int, int]:
    lengths = scheduler.kv_rule.held_lengths(prompt, computed)
    return dict(enumerate(num_pages(lengths, BLOCK_SIZE)))


@pytest.mark.parametrize("evict", ["prompt_end", "chunk"])
@pytest.mark.parametrize("tiers", [1, 3, "layers"])
@pytest.mark.parametrize("chunk", [64, 256])
def test_after_a_prompt_the_pool_holds_exactly_the_kept_pages(
    tiny_llama: str, evict: str, tiers: int | str, chunk: int
) -> None:
    """This also holds after every later token; at the end all pages are free."""
    policy = SMALL | {"evict": evict, "tiers": tiers}
    scheduler = make_scheduler(tiny_llama, 200, policy, max_num_batched_tokens=chunk)
    driver, total = Driver(scheduler), free_pages(scheduler)
    request = make_request("a", prompt=400, output=70)
    scheduler.add_request(request)
    while scheduler.requests:
        driver.step()
        if "a" not in scheduler.requests:
            break
        expected = rule_pages(scheduler, 400, request.num_computed_tokens)
        assert held_pages(scheduler, "a") == expected
        assert free_pages(scheduler) == total - sum(expected.values())
    assert free_pages(scheduler) == total
    assert len(scheduler.tier_lengths) == 0
    counters = scheduler.kv_counters
    assert counters.num_compactions == (
        1 if evict == "prompt_end" else -(-400 // chunk)
    )
    assert counters.num_pages_freed > 0
    assert counters.num_evicted_tokens == sum(
        size * (400 - kept)
        for size, kept in zip(
            scheduler.kv_rule.layout.sizes,
            scheduler.kv_rule.cache_lengths(400),
            strict=True,
        )
    )


def test_retention_one_frees_nothing(tiny_llama: str) -> None:
    scheduler = make_scheduler(tiny_llama, 200, SMALL | {"retention": 1.0})
    scheduler.add_request(make_request("a", prompt=400, output=20))
    driver = Driver(scheduler)
    driver.run()
    assert scheduler.kv_counters.num_pages_freed == 0
    assert all(not plan.compactions for plan in driver.plans)


def test_the_plan_says_once_what_is_evicted(tiny_llama: str) -> None:
    scheduler = make_scheduler(tiny_llama, 200, SMALL)
    scheduler.add_request(make_request("a", prompt=200, output=4))
    driver = Driver(scheduler)
    driver.run()
    kept = scheduler.kv_rule.cache_lengths(200)
    first, *later = [plan for plan in driver.plans if plan.num_reqs]
    (window,) = first.windows
    assert (window.num_tokens, window.num_kept, window.retain) == (200, kept, False)
    assert window.num_queries == window.num_recent == 16
    assert len(later) == 3
    assert first.compactions == [("a", 200, kept)]
    for plan in later:
        assert not plan.windows
        assert not plan.compactions


def test_chunks_retain_only_the_queries_of_the_recent_window(tiny_llama: str) -> None:
    scheduler = make_scheduler(tiny_llama, 200, SMALL, max_num_batched_tokens=64)
    scheduler.add_request(make_request("a", prompt=130, output=1))
    driver = Driver(scheduler)
    driver.run()
    chunks = [plan.windows for plan in driver.plans if plan.num_reqs]
    assert [len(windows) for windows in chunks] == [0, 1, 1]
    middle, last = chunks[1][0], chunks[2][0]
    # Of the window 114..129, the second chunk (64..127) has the first 14 queries.
    assert (middle.retain, middle.num_queries, middle.num_kept) == (True, 14, None)
    assert (last.retain, last.num_queries) == (False, 16)


def test_a_replay_ends_a_chunk_at_the_prompts_end(tiny_llama: str) -> None:
    """A preempted request's outputs must see the compacted prompt again."""
    scheduler = make_scheduler(tiny_llama, 200, SMALL, max_num_batched_tokens=512)
    request = make_request("a", prompt=200, output=50)
    scheduler.add_request(request)
    driver = Driver(scheduler)
    for _ in range(20):
        driver.step()
    assert request.num_computed_tokens > 200
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(scheduler.tier_lengths) == 0, "counts go with the pages"
    before = len(driver.plans)
    driver.step()
    assert request.num_computed_tokens == 200
    assert driver.plans[before].windows[0].num_tokens == 200
    assert "a" in driver.plans[before].released
    driver.run()
    assert request.num_output_tokens == 50


@pytest.mark.parametrize("change", [{"prune_from": 0}, {"evict": "chunk"}])
def test_a_replay_cuts_a_prompt_as_at_first(
    tiny_llama: str, change: dict[str, Any]
) -> None:
    """What is kept depends on the cut here, and other requests had a part in the
    cut."""
    scheduler = make_scheduler(
        tiny_llama, 300, SMALL | change, max_num_batched_tokens=100
    )
    driver, ends = Driver(scheduler), []
    for name, prompt in (("a", 30), ("b", 260)):
        scheduler.add_request(make_request(name, prompt, 40))
    request = scheduler.requests["b"]
    while request.num_output_tokens < 3:
        driver.step()
        ends.append(request.num_computed_tokens)
    assert ends[:3] == [70, 169, 260], "one row of each step is the other's"
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    for end in ends[:3]:
        driver.step()
        assert request.num_computed_tokens == end
    driver.run()


@pytest.mark.parametrize("evict", ["prompt_end", "chunk"])
def test_two_steps_in_flight(
    tiny_llama: str, evict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step N+1 is planned before N's output is known, and pages that step N evicts are
    handed out only after step N has been scheduled whole."""
    scheduler = make_scheduler(
        tiny_llama, 70, SMALL | {"evict": evict}, async_scheduling=True
    )
    events: list[str] = []
    pool = scheduler.kv_cache_manager.block_pool
    truncate = TierBlockManager.truncate
    get_new_blocks = pool.get_new_blocks

    def allocates(count: int) -> Any:
        events.append("allocates")
        return get_new_blocks(count)

    def evicts(manager: TierBlockManager, req_id: str, num_held: int) -> Any:
        freed = truncate(manager, req_id, num_held)
        events.extend(["evicts"] * bool(freed))
        return freed

    monkeypatch.setattr(pool, "get_new_blocks", allocates)
    monkeypatch.setattr(TierBlockManager, "truncate", evicts)
    total = free_pages(scheduler)
    for index, prompt in enumerate((300, 40, 200, 120, 350, 90)):
        scheduler.add_request(make_request(str(index), prompt, output=30))
    driver, num_evicting_steps = Driver(scheduler, depth=2), 0
    while scheduler.has_unfinished_requests():
        events.clear()
        driver.step()
        assert events == sorted(events), "a page was evicted, then handed out at once"
        num_evicting_steps += "evicts" in events
    while driver.num_flying:
        driver.land()
    assert num_evicting_steps >= 3
    assert free_pages(scheduler) == total
    assert len(scheduler.tier_lengths) == 0


def replay_is_consistent(driver: Driver) -> None:
    """A worker that only ever sees plans, in order, has the scheduler's counts."""
    evicted: dict[str, tuple[int, ...]] = {}
    for plan, expected in zip(driver.plans, driver.evicted, strict=True):
        for req_id in plan.released:
            evicted.pop(req_id, None)
        for req_id, num_tokens, num_kept in plan.compactions:
            evicted[req_id] = tuple(num_tokens - kept for kept in num_kept)
        assert evicted == expected


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("depth", [1, 2])
def test_random_schedules_lose_no_page(tiny_llama: str, seed: int, depth: int) -> None:
    """Arrivals, aborts (also between plan and execution), preemptions, priorities."""
    rng = random.Random(seed)
    scheduler = make_scheduler(
        tiny_llama,
        rng.choice([52, 60, 90]),
        SMALL
        | {
            "evict": rng.choice(["prompt_end", "chunk"]),
            "tiers": rng.choice([1, 2, 3]),
            "prune_from": rng.choice([None, 0, 2]),
            "exceed_length_to_compress": rng.choice([None, 8]),
        },
        max_num_batched_tokens=rng.choice([64, 128, 512]),
        scheduling_policy=rng.choice(["fcfs", "priority"]),
        async_scheduling=depth > 1,
    )
    driver, total, arrived = Driver(scheduler, depth), free_pages(scheduler), 0
    for _ in range(150):
        if arrived < 30 and rng.random() < 0.4:
            scheduler.add_request(
                make_request(
                    str(arrived),
                    rng.randint(1, 400),
                    rng.randint(1, 100),
                    rng.randint(0, 3),
                )
            )
            arrived += 1
        driver.step()
        if scheduler.requests and rng.random() < 0.1:
            victim = rng.choice(list(scheduler.requests))
            scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
            scheduler.check_integrity()
    driver.run()
    assert free_pages(scheduler) == total
    assert len(scheduler.tier_lengths) == 0
    assert scheduler.kv_counters.num_compactions > 0
    replay_is_consistent(driver)


def test_random_schedules_do_preempt(tiny_llama: str) -> None:
    """The schedules above prove little if nothing is ever preempted."""
    scheduler = make_scheduler(tiny_llama, 52, SMALL | {"growth_reserve": 0})
    requests = [make_request(str(i), 300, 150) for i in range(6)]
    for request in requests:
        scheduler.add_request(request)
    Driver(scheduler).run()
    assert sum(request.num_preemptions for request in requests) > 0
    assert all(request.num_output_tokens == 150 for request in requests)


def test_integrity_check_finds_a_lost_page(tiny_llama: str) -> None:
    scheduler = make_scheduler(tiny_llama, 60, SMALL)
    scheduler.add_request(make_request("a", 100, 10))
    Driver(scheduler).step()
    scheduler.tier_managers[0].req_to_blocks["a"].pop()
    with pytest.raises(AssertionError, match="pages are free"):
        scheduler.check_integrity()


def test_integrity_check_finds_a_page_held_twice(tiny_llama: str) -> None:
    scheduler = make_scheduler(tiny_llama, 60, SMALL)
    scheduler.add_request(make_request("a", 100, 10))
    Driver(scheduler).step()
    first, second = scheduler.tier_managers[:2]
    second.req_to_blocks["a"][0] = first.req_to_blocks["a"][0]
    with pytest.raises(AssertionError, match="group 0 and request a, group 1"):
        scheduler.check_integrity()


def test_memory_for_four_stock_sequences_runs_seven(tiny_llama: str) -> None:
    """They run at retention 0.5, by the pages that are really held."""
    prompt, output, layers = 448, 32, 6
    stock_pages = -(-(prompt + output) // BLOCK_SIZE)
    scheduler = make_scheduler(
        tiny_llama,
        4 * stock_pages * layers // 2 + 1,  # a page holds 2 layers: 3 tiers of 6
        SMALL | {"retention": 0.5},
        max_num_batched_tokens=512,
    )
    for index in range(12):
        scheduler.add_request(make_request(str(index), prompt, output))
    Driver(scheduler).run()
    assert scheduler.kv_counters.max_num_running >= 7


def test_streamed_prompts_end_with_an_error_and_alone(tiny_llama: str) -> None:
    scheduler = make_scheduler(tiny_llama, 60, SMALL)
    request, other = make_request("a", 100, 10), make_request("b", 100, 10)
    request.resumable = True
    scheduler.add_request(request)
    scheduler.add_request(other)
    driver = Driver(scheduler)
    driver.run()
    assert driver.finished["a"] == "error"
    assert driver.finished["b"] == "length"
    assert scheduler.kv_counters.num_refused_requests == 1


def test_the_report_counts_like_the_pool(tiny_llama: str) -> None:
    """The scheduler gives a request what the start-up log says that it needs."""
    scheduler = make_scheduler(tiny_llama, 60, SMALL)
    report = scheduler.kv_report
    scheduler.add_request(make_request("a", 256, 10))
    Driver(scheduler).step()
    pages = sum(held_pages(scheduler, "a").values())
    page_bytes = (
        2 * 32 * 2 * 32 * 2 * 4
    )  # 2 layers of 32 tokens, 2 heads of 32, K and V
    stock_bytes = 256 // 32 * page_bytes * 3
    line = report.lines()[2]
    assert f"{pages * page_bytes:,} KV bytes" in line
    assert f"against {stock_bytes:,} in stock" in line
    assert f"{59 / pages:.1f} at once in {59 * page_bytes:,} bytes" in line


def test_outputs_end_where_the_pool_does(tiny_llama: str) -> None:
    """With eviction by chunk a longest length that stock refuses is accepted; a short
    prompt with a long output then ends with the pool, as at the longest length."""
    scheduler = make_scheduler(
        tiny_llama, 37, SMALL | {"evict": "chunk"}, max_num_batched_tokens=64
    )
    long_output = make_request("a", 10, 500)
    long_prompt = make_request("b", 480, 20)
    for request in (long_output, long_prompt):
        scheduler.add_request(request)
    Driver(scheduler).run()
    assert long_output.num_output_tokens == 12 * BLOCK_SIZE - 10 + 1
    assert long_prompt.num_output_tokens == 20
    assert scheduler.kv_counters.num_capped_outputs == 1


def test_outputs_end_at_the_longest_length_where_the_pool_allows(
    tiny_llama: str,
) -> None:
    scheduler = make_scheduler(tiny_llama, 200, SMALL)
    request = make_request("a", 10, 100_000)
    scheduler.add_request(request)
    Driver(scheduler).run()
    assert request.num_tokens == 512
    assert scheduler.kv_counters.num_capped_outputs == 0
