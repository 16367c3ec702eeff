"""Segments: compressed by position alone, and shared by requests with one prefix."""

from typing import Any

import pytest

from pyramid_vllm.policy import KVPolicyError, LengthRule, PolicyConfig, tier_layout
from pyramid_vllm.policy.segments import Segments, kept_of_segment
from pyramid_vllm.scheduler.segments import namespace
from tests.engines import close, generate, make_llm, random_prompts, scheduler_of
from tests.models import save_tiny
from tests.oracle import DenseModel, Oracle
from tests.scheduling import (
    Driver,
    free_pages,
    held_pages,
    make_request,
    make_scheduler,
    serve,
)

SEGMENTS: dict[str, Any] = {
    "base": "pyramid-by-depth",
    "evict": "segment",
    "segment": 128,
    "recent": 32,
    "scorer": "key_diff",
    "retention": 0.5,
    "steepness": 0.8,
    "tiers": 3,
}
NUM_TOKENS = 40


def config(**changes: Any) -> PolicyConfig:
    settings = {key: value for key, value in SEGMENTS.items() if key != "base"}
    return PolicyConfig(name="s", page=32, **(settings | changes))


# Counts.


def test_a_segment_keeps_whole_pages() -> None:
    """Shares are rounded to pages, halves up; no tier keeps nothing."""
    shares = [0, 10**8, 125 * 10**6, 375 * 10**6, 10**9]
    assert kept_of_segment(128, 32, shares) == (32, 32, 32, 64, 128)


def test_counts_follow_from_the_position_alone() -> None:
    segments = Segments(128, 32, (96, 32))
    assert segments.next_end(0) == segments.end(0) == 160
    for num_tokens, num_compressed in ((0, 0), (159, 0), (160, 1), (287, 1), (288, 2)):
        assert segments.num_compressed(num_tokens) == num_compressed
        held = tuple(num_tokens - num_compressed * gone for gone in (32, 96))
        assert segments.held(num_tokens) == held


@pytest.mark.parametrize("num_tokens", [0, 100, 159, 160, 200, 287, 288, 1000, 1055])
def test_the_peak_bounds_every_step(num_tokens: int) -> None:
    """A step that compresses holds the whole segment until its end."""
    segments = Segments(128, 32, (96, 32))
    held = [segments.held(0)]
    for computed in range(1, num_tokens + 1):
        before = segments.num_compressed(computed - 1)
        gone = segments.num_evicted(before)
        held.append(tuple(computed - count for count in gone))
    assert segments.peak(num_tokens) == tuple(map(max, zip(*held, strict=True)))


def test_a_rule_is_the_same_for_prompts_and_outputs() -> None:
    rule = LengthRule(config(), tier_layout(config(), 6))
    for num_tokens in (1, 159, 160, 500, 1000):
        lengths = {rule.held_lengths(n, num_tokens) for n in (1, 100, 400, num_tokens)}
        assert lengths == {rule.cache_lengths(num_tokens)}


def test_whole_shares_are_stock() -> None:
    rule = LengthRule(config(retention=1.0), tier_layout(config(retention=1.0), 6))
    assert rule.segments is None
    assert set(rule.cache_lengths(5000)) == {5000}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment": 100}, "segment=100: valid with pages of 32 tokens"),
        ({"prune_from": 2}, "prune_from=2: valid with evict 'segment' is none"),
        ({"hit_split": "ignore"}, "hit_split=ignore: valid with evict 'segment'"),
        ({"exceed_length_to_compress": 8}, "exceed_length_to_compress=8"),
        ({"recent_ratio": 0.1}, "recent_ratio=0.1"),
        ({"scorer": "votes"}, "valid with evict 'segment' are attention, key_norm"),
    ],
)
def test_what_segments_do_not_support_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_segments_that_are_no_whole_pages_are_refused_at_start(tiny_llama: str) -> None:
    with pytest.raises(KVPolicyError, match="segment=144: valid with pages of 32"):
        make_scheduler(tiny_llama, 100, {**SEGMENTS, "segment": 144})


# Pages.


def scheduler_with(model: str, num_blocks: int = 200, **changes: Any) -> Any:
    settings = {"enable_prefix_caching": True, "max_model_len": 1024}
    settings |= {key: changes.pop(key) for key in list(changes) if key in SETTINGS}
    return make_scheduler(model, num_blocks, SEGMENTS | changes, **settings)


SETTINGS = ("enable_prefix_caching", "max_model_len", "max_num_batched_tokens")


def prompt_tokens(driver: Driver) -> int:
    """That were computed."""
    return sum(plan.num_prompt_tokens for plan in driver.plans)


@pytest.mark.parametrize("caching", [True, False])
def test_a_request_holds_what_the_rule_says(tiny_llama: str, caching: bool) -> None:
    """In prompt and output, after every step; at the end all pages come back."""
    scheduler = scheduler_with(tiny_llama, enable_prefix_caching=caching)
    total = free_pages(scheduler)
    scheduler.add_request(make_request("a", 300, 200))
    driver = Driver(scheduler)
    while scheduler.has_requests():
        driver.step()
        request = scheduler.requests.get("a")
        if request is None:
            break
        lengths = scheduler.kv_rule.cache_lengths(request.num_computed_tokens)
        held = held_pages(scheduler, "a")
        for tier, length in enumerate(lengths):
            assert held[tier] == -(-length // 32)
    driver.run()
    assert scheduler.kv_counters.num_segments == 3
    assert free_pages(scheduler) == total


def test_chunks_end_where_a_segment_is_due(tiny_llama: str) -> None:
    scheduler = scheduler_with(tiny_llama)
    driver = serve(scheduler, make_request("a", 500, 2))
    chunks = [plan.num_prompt_tokens for plan in driver.plans]
    assert [chunk for chunk in chunks if chunk] == [160, 128, 128, 84]


def test_a_short_prompt_is_stocks(tiny_llama: str) -> None:
    scheduler = scheduler_with(tiny_llama)
    driver = serve(scheduler, make_request("a", 150, 8))
    assert not any(plan.generated for plan in driver.plans)
    assert scheduler.kv_counters.num_compactions == 0


def test_a_second_request_gets_segments_and_whole_pages(tiny_llama: str) -> None:
    scheduler = scheduler_with(tiny_llama)
    serve(scheduler, make_request("a", 500, 2))
    driver = serve(scheduler, make_request("b", 500, 2))
    # All but the last page's tokens: a hit is whole pages.
    assert prompt_tokens(driver) == 500 - 480
    segments = scheduler.kv_rule.segments
    assert driver.plans[0].begun == {"b": segments.num_evicted(3)}
    assert scheduler.kv_counters.num_segment_hits == 3


def test_outputs_are_found_too(tiny_llama: str) -> None:
    """The next turn of a chat finds the last answer, compressed."""
    scheduler = scheduler_with(tiny_llama)
    first = make_request("a", 100, 300)
    serve(scheduler, first)
    turn = make_request("b", 450, 2)
    turn.prompt_token_ids[:400] = list(first.all_token_ids)
    turn._all_token_ids[:400] = list(first.all_token_ids)
    turn.block_hashes.clear()
    turn.update_block_hashes()
    driver = serve(scheduler, turn)
    assert prompt_tokens(driver) == 450 - 384
    assert scheduler.kv_counters.num_segment_hits == 2


def test_a_prefix_is_computed_once_by_requests_that_arrive_together(
    tiny_llama: str,
) -> None:
    scheduler = scheduler_with(tiny_llama, num_blocks=400)
    driver = serve(scheduler, *(make_request(str(i), 600, 2) for i in range(4)))
    assert prompt_tokens(driver) == 600 + 3 * (600 - 576)
    assert scheduler.kv_counters.num_waits > 0
    assert scheduler.kv_counters.max_num_running == 4


def test_others_do_not_wait(tiny_llama: str) -> None:
    """A request whose prefix nobody computes passes those that wait."""
    scheduler = scheduler_with(tiny_llama, num_blocks=400)
    scheduler.add_request(make_request("a", 600, 2))
    scheduler.add_request(make_request("b", 600, 2))
    scheduler.add_request(make_request("c", 90, 2, shared=0))
    Driver(scheduler).step()
    assert [request.request_id for request in scheduler.running] == ["a", "c"]


def test_a_segment_that_is_there_when_it_is_due_is_shared(tiny_llama: str) -> None:
    """Two requests that differ within the recent window of a segment."""
    scheduler = scheduler_with(tiny_llama)
    serve(scheduler, make_request("a", 300, 2))
    scheduler.add_request(make_request("b", 300, 8, shared=256))
    driver = Driver(scheduler)
    plan = driver.step()
    # Tokens up to 256 are the same: so is the second segment.
    (window,) = plan.generated
    assert window.is_found
    assert plan.num_prompt_tokens == 288 - 256
    assert scheduler.kv_counters.num_shared_segments == 1
    tables = [manager.req_to_blocks["b"] for manager in scheduler.tier_managers]
    for manager, table in zip(scheduler.tier_managers, tables, strict=True):
        kept = scheduler.kv_rule.segments.kept[manager.kv_cache_spec.tier] // 32
        assert len(table) == 2 * kept + 1
    driver.run()


def test_a_segment_that_is_lost_in_part_is_a_miss_from_there_on(
    tiny_llama: str,
) -> None:
    scheduler = scheduler_with(tiny_llama)
    serve(scheduler, make_request("a", 600, 2))
    cache = scheduler.kv_cache_manager.segments
    request = make_request("b", 600, 2)
    scheduler.requests["b"] = request
    assert cache.find(request, 599).num_tokens == 576
    (pages, *_) = cache.find_segment(request, 2)
    scheduler.kv_cache_manager.block_pool.evict_blocks({pages[-1].block_id})
    # Two segments are left, and what is whole behind them.
    assert cache.find(request, 599).num_tokens == 416 - 32
    del scheduler.requests["b"]


def test_other_policies_share_nothing(tiny_llama: str) -> None:
    scheduler = scheduler_with(tiny_llama)
    serve(scheduler, make_request("a", 500, 2))
    for name, wish in (("b", {"kv_retention": 0.3}), ("c", {"kv_policy": "none"})):
        driver = serve(scheduler, make_request(name, 500, 2, extra_args=wish))
        assert prompt_tokens(driver) == 500
        driver = serve(scheduler, make_request(f"{name}2", 500, 2, extra_args=wish))
        assert prompt_tokens(driver) == 500 - 480
    rules = [
        LengthRule(config(retention=r), tier_layout(config(), 6)) for r in (0.4, 1)
    ]
    assert namespace(rules[0])
    assert namespace(rules[1]) == ""


# Engines.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DenseModel]:
    path = save_tiny(tmp_path_factory.mktemp("llama"), "llama", 6)
    return path, DenseModel(path)


COMMON = random_prompts([450], seed=1)[0]
LENGTHS = [(450, 0), (450, 150), (300, 150), (450, 20), (256, 300), (0, 90), (130, 40)]
PROMPTS = [
    COMMON[:shared] + random_prompts([new], seed=10 + i)[0]
    for i, (shared, new) in enumerate(LENGTHS)
]


def engine(path: str, policy: dict[str, Any], **settings: Any) -> Any:
    return make_llm(
        path, kv_policy=SEGMENTS | policy, enable_prefix_caching=None, **settings
    )


@pytest.mark.parametrize("selection", ["layer", "head"])
@pytest.mark.parametrize("scorer", ["key_diff", "key_norm", "attention"])
def test_engines_equal_the_oracle(
    model: tuple[str, DenseModel], scorer: str, selection: str
) -> None:
    """Cold, hit, and in one batch: each token is the oracle's."""
    path, dense = model
    llm = engine(path, {"scorer": scorer, "selection": selection})
    try:
        scheduler = scheduler_of(llm)
        oracle = Oracle(dense, scheduler.kv_rule.config)
        decided = []
        for _ in range(2):
            for prompt, ours in zip(
                PROMPTS, generate(llm, PROMPTS, NUM_TOKENS), strict=True
            ):
                expected = oracle.run(prompt, [len(prompt)], ours.tokens)
                decided.append(expected.decided)
                if not expected.decided:
                    continue
                for token, row in zip(ours.tokens, expected.logprobs, strict=True):
                    assert float(row.max() - row[token]) < 1e-3
        # In the first layer equal tokens have equal norms, whatever their position.
        least = 1 if scorer == "key_norm" else len(decided) * 2 // 3
        assert sum(decided) >= least
        counters = scheduler.kv_counters
        assert counters.num_segments > counters.num_shared_segments
        assert counters.num_segment_hits > 10
        scheduler.check_integrity()
    finally:
        close(llm)


def test_tokens_do_not_depend_on_chunks_hits_batches_or_preemption(
    model: tuple[str, DenseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law: what is kept depends on the tokens alone."""
    path, _ = model
    found: dict[str, list[list[int]]] = {}
    for chunk in (64, 512, 2048):
        llm = engine(path, {}, max_num_batched_tokens=chunk)
        try:
            alone = [generate(llm, [p], NUM_TOKENS)[0].tokens for p in PROMPTS]
            found[f"{chunk}, one after the other"] = alone
            llm.reset_prefix_cache()
            batch = generate(llm, PROMPTS, NUM_TOKENS)
            found[f"{chunk}, in one batch"] = [ours.tokens for ours in batch]
        finally:
            close(llm)
    # Memory for two: the others are preempted, and replayed.
    llm = engine(
        path,
        {"growth_reserve": 0},
        kv_cache_memory_bytes=1_700_000,
        max_model_len=640,
    )
    preempt, preempted = scheduler_of(llm)._preempt_request, []

    def counting(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler_of(llm), "_preempt_request", counting)
    try:
        batch = generate(llm, PROMPTS, NUM_TOKENS)
        found["short of memory"] = [ours.tokens for ours in batch]
    finally:
        close(llm)
    assert preempted
    first = found["512, one after the other"]
    assert all(tokens == first for tokens in found.values()), found


def test_retention_one_is_stock(model: tuple[str, DenseModel]) -> None:
    path, _ = model
    found = []
    for settings in ({"kv_policy": SEGMENTS | {"retention": 1.0}}, {}):
        llm = make_llm(path, enable_prefix_caching=None, **settings)
        try:
            found.append([ours.tokens for ours in generate(llm, PROMPTS, NUM_TOKENS)])
        finally:
            close(llm)
    assert found[0] == found[1]
