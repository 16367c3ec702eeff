"""Pages of the prefix cache stay whole and shared; the rest is evicted."""

from typing import Any

import pytest

from tests.engines import close, generate, make_llm, random_prompts, scheduler_of
from tests.models import save_tiny
from tests.oracle import DenseModel, Oracle
from tests.scheduling import (
    BLOCK_SIZE,
    Driver,
    free_pages,
    held_pages,
    make_request,
    make_scheduler,
    serve,
)

SMALL: dict[str, Any] = {
    "base": "pyramid-by-depth",
    "recent": 16,
    "min_context": 32,
    "tiers": 3,
}
SETTINGS = {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 3}
COMMON = random_prompts([330], seed=1)[0]
#: How many tokens are shared with the first prompt, and how many are new.
LENGTHS = [(330, 200), (300, 150), (330, 20), (100, 300), (0, 90)]
PROMPTS = [
    COMMON[:shared] + random_prompts([new], seed=10 + i)[0]
    for i, (shared, new) in enumerate(LENGTHS)
]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DenseModel]:
    path = save_tiny(tmp_path_factory.mktemp("llama"), "llama", 6)
    return path, DenseModel(path)


def assert_equals_oracle(ours: Any, oracle: Oracle, prompt: list[int]) -> bool:
    """Whether the oracle's choices were decided; tokens are compared if they were."""
    shared = ours.num_cached
    chunks = [shared, len(prompt) - shared] if shared else [len(prompt)]
    expected = oracle.run(prompt, chunks, ours.tokens, shared=shared)
    if not expected.decided:
        return False
    for token, row in zip(ours.tokens, expected.logprobs, strict=True):
        assert float(row.max() - row[token]) < 1e-3
    return True


@pytest.mark.parametrize(
    ("policy", "config"),
    [
        ("pyramid-by-depth", SETTINGS),
        ("pyramid", {**SETTINGS, "tiers": "auto", "selection": "head"}),
        ("pyramid-by-depth", {**SETTINGS, "exceed_length_to_compress": 4, "recent": 8}),
        ("streaming", SETTINGS),
        ("snapkv", {"recent": 16, "pooling": "max", "pool_kernel": 7}),
        ("h2o", {"tiers": 2}),
        ("knorm", {}),
    ],
)
def test_hits_stay_whole_and_the_rest_is_evicted(
    model: tuple[str, DenseModel], policy: str, config: dict[str, Any]
) -> None:
    """Cold, hit, and hit by several at once: each as the oracle says for its split."""
    path, dense = model
    llm = make_llm(
        path,
        kv_policy=policy,
        kv_policy_config=config,
        enable_prefix_caching=None,
        max_num_batched_tokens=256,
    )
    try:
        oracle = Oracle(dense, config_of(llm))
        (first,) = generate(llm, [COMMON], NUM_TOKENS)
        assert first.num_cached == 0
        decided = [assert_equals_oracle(first, oracle, COMMON)]
        for _ in range(2):
            for prompt, ours in zip(
                PROMPTS, generate(llm, PROMPTS, NUM_TOKENS), strict=True
            ):
                decided.append(assert_equals_oracle(ours, oracle, prompt))
        hits = [ours.num_cached for ours in generate(llm, PROMPTS, 1)]
        assert hits == [
            (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in PROMPTS
        ]
        assert sum(decided) >= len(decided) * 2 // 3
        assert scheduler_of(llm).kv_counters.num_compactions >= 5
        scheduler_of(llm).check_integrity()
    finally:
        close(llm)


def config_of(llm: Any) -> Any:
    """The engine's policy with a number of tiers, as the oracle wants it."""
    rule = scheduler_of(llm).kv_rule
    return rule.config.model_copy(update={"tiers": rule.layout.num_tiers})


def test_a_hit_computes_what_stock_would(tiny_llama: str) -> None:
    scheduler = make_scheduler(tiny_llama, 300, SMALL, enable_prefix_caching=True)
    for name, computed in (("a", 200), ("b", 200 - 192)):
        driver = serve(scheduler, make_request(name, 200, 2))
        assert sum(plan.num_prompt_tokens for plan in driver.plans) == computed


def test_a_short_own_part_holds_no_more_than_stock(tiny_llama: str) -> None:
    """Eight requests behind one prefix share its pages in all tiers."""
    scheduler = make_scheduler(
        tiny_llama, 300, SMALL, enable_prefix_caching=True, max_model_len=512
    )
    serve(scheduler, make_request("first", 400, 1))
    total, compactions = free_pages(scheduler), scheduler.kv_counters.num_compactions
    for i in range(8):
        scheduler.add_request(make_request(str(i), 416, 4, shared=384))
    driver = Driver(scheduler)
    driver.step()
    shared = 384 // BLOCK_SIZE
    tables = [m.req_to_blocks for m in scheduler.tier_managers]
    for table in tables:
        ids = {tuple(b.block_id for b in table[str(i)][:shared]) for i in range(8)}
        assert len(ids) == 1, "the pages of the prefix are not shared"
    assert total - free_pages(scheduler) == 3 * (shared + 8)
    driver.run()
    assert scheduler.kv_counters.num_compactions == compactions
    assert scheduler.kv_counters.unpruned["cached_prefix"] == 8


def test_only_own_tokens_are_evicted(tiny_llama: str) -> None:
    scheduler = make_scheduler(tiny_llama, 300, SMALL, enable_prefix_caching=True)
    serve(scheduler, make_request("first", 200, 1))
    scheduler.add_request(make_request("a", 400, 3, shared=200))
    driver = Driver(scheduler)
    plan = driver.step()
    (window,) = plan.windows
    own = scheduler.kv_rule.cache_lengths(400 - 192)
    assert window.num_shared == 192
    assert window.num_kept == tuple(192 + count for count in own)
    assert min(own) < 400 - 192
    # What is hit stays in the table and in the cache.
    for table in (m.req_to_blocks["a"] for m in scheduler.tier_managers):
        assert all(block.block_hash is not None for block in table[: 192 // BLOCK_SIZE])
    assert held_pages(scheduler, "a") == {
        tier: -(-count // BLOCK_SIZE) for tier, count in enumerate(window.num_kept)
    }
    driver.run()


def scheduler_of_large_steps(model: str) -> Any:
    """A scheduler whose steps compute several whole prompts."""
    return make_scheduler(
        model, 400, SMALL, enable_prefix_caching=True, max_num_batched_tokens=4096
    )


def test_equal_prompts_in_one_step_are_computed_once(tiny_llama: str) -> None:
    """As in stock vLLM, a prompt that is computed in a step can be hit in it."""
    scheduler = scheduler_of_large_steps(tiny_llama)
    for i in range(4):
        scheduler.add_request(make_request(str(i), 400, 8))
    driver = Driver(scheduler)
    plan = driver.step()
    assert plan.num_prompt_tokens == 400 + 3 * (400 - 384)
    # What others read is not evicted either: it would free nothing.
    assert not plan.windows
    assert held_pages(scheduler, "0") == dict.fromkeys(range(3), 13)
    driver.run()
    assert scheduler.kv_counters.num_compactions == 0


def test_what_others_got_of_a_prompt_stays_whole(tiny_llama: str) -> None:
    """The first of two prompts evicts only what the second does not read."""
    scheduler = scheduler_of_large_steps(tiny_llama)
    total = free_pages(scheduler)
    scheduler.add_request(make_request("a", 400, 8))
    scheduler.add_request(make_request("b", 200, 8, shared=160))
    driver = Driver(scheduler)
    (window,) = driver.step().windows
    assert (window.req_id, window.num_shared) == ("a", 160)
    kept = scheduler.kv_rule.kept_of_prompt(400, 160)
    assert window.num_kept == kept
    assert held_pages(scheduler, "a") == {t: -(-n // 32) for t, n in enumerate(kept)}
    driver.run()
    assert free_pages(scheduler) == total


@pytest.mark.parametrize(("num_waiting", "shared"), [(1, 0), (2, 160)])
def test_what_waiting_requests_will_get_stays_whole(
    tiny_llama: str, num_waiting: int, shared: int
) -> None:
    """Two of them: a single one may be the next turn of a chat."""
    scheduler = make_scheduler(
        tiny_llama, 400, SMALL, enable_prefix_caching=True, max_num_batched_tokens=400
    )
    scheduler.add_request(make_request("a", 400, 8))
    for i in range(num_waiting):
        scheduler.add_request(make_request(str(i), 200, 8, shared=160))
    (window,) = Driver(scheduler).step().windows
    assert (window.req_id, window.num_shared) == ("a", shared)


def test_a_page_that_is_hit_in_the_step_of_its_compaction_is_replaced(
    tiny_llama: str,
) -> None:
    """The second request hits pages that the first one was about to write."""
    scheduler = make_scheduler(
        tiny_llama,
        13 * 3 + 1 + 30,
        SMALL | {"hit_split": "ignore"},
        enable_prefix_caching=True,
        max_num_batched_tokens=4096,
    )
    scheduler.add_request(make_request("a", 400, 8))
    scheduler.add_request(make_request("b", 400, 8))
    plan = Driver(scheduler).step()
    (window,) = [window for window in plan.windows if window.num_kept]
    tables = [manager.req_to_blocks["b"] for manager in scheduler.tier_managers]
    read = {block.block_id for table in tables for block in table}
    assert window.pages is not None
    written = {page for pages in window.pages for page in pages or ()}
    assert written
    assert not written & read


def test_a_replay_repeats_the_split(tiny_llama: str) -> None:
    """Whatever it hits then: nothing, or more than at first."""
    scheduler = make_scheduler(
        tiny_llama,
        300,
        SMALL,
        enable_prefix_caching=True,
        max_num_batched_tokens=1024,
    )
    serve(scheduler, make_request("first", 200, 1))
    for reset in (False, True):
        request = make_request(f"a{reset}", 400, 30, shared=200)
        scheduler.add_request(request)
        driver = Driver(scheduler)
        before = driver.step().windows[0].num_kept
        driver.step()
        scheduler.running.remove(request)
        scheduler._preempt_request(request, 0.0)
        if reset:
            assert scheduler.reset_prefix_cache()
        plan = driver.step()
        if reset:
            assert plan.num_prompt_tokens == 400
        windows = [window for window in plan.windows if window.num_kept]
        assert [(w.num_shared, w.num_kept) for w in windows] == [(192, before)]
        driver.run()


def test_hit_split_ignore_evicts_the_whole_prompt(tiny_llama: str) -> None:
    policy = SMALL | {"hit_split": "ignore"}
    scheduler = make_scheduler(tiny_llama, 300, policy, enable_prefix_caching=True)
    serve(scheduler, make_request("first", 400, 1))
    driver = serve(scheduler, make_request("a", 400, 3))
    windows = [window for plan in driver.plans for window in plan.windows]
    kept = scheduler.kv_rule.cache_lengths(400)
    assert [window.num_kept for window in windows if window.num_kept] == [kept]
    assert {window.num_shared for window in windows} == {0}


def num_found(scheduler: Any, prompt: int) -> int:
    """Tokens of a prompt that the prefix cache holds."""
    request = make_request("probe", prompt, 1)
    _, found, _ = scheduler.kv_cache_manager.get_computed_blocks(request)
    return int(found)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_cached_prefixes_shrink_from_their_end(tiny_llama: str, share: float) -> None:
    """Under pressure the last pages go first, in all tiers alike."""
    policy = SMALL | {"retention": 1.0}
    scheduler = make_scheduler(
        tiny_llama, 16 * 3 + 1, policy, enable_prefix_caching=True, max_model_len=512
    )
    serve(scheduler, make_request("a", 512 - 1, 1))
    pages = 511 // BLOCK_SIZE
    assert num_found(scheduler, 511) == pages * BLOCK_SIZE
    pool = scheduler.kv_cache_manager.block_pool
    # Pages that hold nothing of the cache are used first.
    num_overwritten = int(share * pages * 3)
    plain = free_pages(scheduler) - pages * 3
    pool.get_new_blocks(plain + num_overwritten)
    lost = -(-num_overwritten // 3)
    assert num_found(scheduler, 511) == (pages - lost) * BLOCK_SIZE


def test_the_reserve_counts_a_shared_page_once(tiny_llama: str) -> None:
    """A prompt whose prefix is shared is admitted as long as its own part fits, and
    the reserve for outputs holds then, too."""
    scheduler = make_scheduler(
        tiny_llama,
        20 * 3 + 1,
        SMALL | {"growth_reserve": "all"},
        enable_prefix_caching=True,
        max_model_len=512,
    )
    serve(scheduler, make_request("first", 400, 1))
    requests = [make_request(str(i), 392, 90, shared=384) for i in range(8)]
    serve(scheduler, *requests)
    assert all(request.num_output_tokens == 90 for request in requests)
    assert scheduler.kv_counters.max_num_running > 1
    assert all(request.num_preemptions == 0 for request in requests)


@pytest.mark.parametrize("is_hit", [False, True])
def test_a_page_that_was_hit_does_not_go_to_save_another(
    tiny_llama: str, is_hit: bool
) -> None:
    """Without a page that holds nothing, a prompt gives its own last pages up."""
    # Nine pages of the first prompt stay in the cache; the long one needs twelve.
    scheduler = make_scheduler(
        tiny_llama,
        (9 + 12) * 3 + 1,
        SMALL,
        enable_prefix_caching=True,
        max_num_batched_tokens=1024,
    )
    serve(scheduler, make_request("system", 290, 1))
    if is_hit:
        serve(scheduler, make_request("user", 291, 1, shared=290))
    assert num_found(scheduler, 290) == 288
    driver = serve(scheduler, make_request("long", 12 * BLOCK_SIZE, 1, shared=0))
    windows = [window for plan in driver.plans for window in plan.windows]
    assert [window.is_ordered for window in windows] == [not is_hit]
    assert (num_found(scheduler, 290) == 288) == is_hit
