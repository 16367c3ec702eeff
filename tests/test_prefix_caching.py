"""Prefix caching with compaction, under ``hit_split: ignore``.

Pages are shared until a prompt is compacted, then stay for others. Hits change no
token.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyramid_vllm.plan import plan_of
from tests.engines import (
    MIB,
    close,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
)
from tests.scheduling import (
    BLOCK_SIZE,
    Driver,
    free_pages,
    held_pages,
    make_request,
    make_scheduler,
)

POLICY = {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 3}
POLICY |= {"hit_split": "ignore"}
SMALL: dict[str, Any] = {
    "hit_split": "ignore",
    "base": "pyramid-by-depth",
    "recent": 16,
    "min_context": 32,
    "tiers": 3,
}

COMMON = random_prompts([600], seed=1)[0]
#: Prompts by how many tokens they share with the first one, and how many are new.
PROMPTS = [
    COMMON[:shared] + random_prompts([new], seed=10 + i)[0]
    for i, (shared, new) in enumerate(
        [(600, 50), (600, 50), (300, 200), (600, 1), (100, 300), (320, 5), (0, 30)]
    )
]
PROMPTS += [PROMPTS[0], PROMPTS[3]]

Engine = Callable[..., Any]


@pytest.fixture
def engine(tiny_llama: str) -> Iterator[Engine]:
    """Makes engines with a policy, one at a time; closes the last one."""
    made: list[Any] = []

    def make(
        config: dict[str, Any], policy: str = "pyramid-by-depth", **settings: Any
    ) -> Any:
        while made:
            close(made.pop())
        made.append(
            make_llm(tiny_llama, kv_policy=policy, kv_policy_config=config, **settings)
        )
        return made[-1]

    yield make
    while made:
        close(made.pop())


def num_hits(llm: Any) -> int:
    """Tokens hit so far, by vLLM's own metric."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    return int(metrics["vllm:prefix_cache_hits"].value)


@pytest.mark.parametrize(
    ("policy", "config"),
    [
        ("pyramid-by-depth", POLICY),
        ("pyramid-by-depth", POLICY | {"selection": "head", "tiers": "layers"}),
        # Tiers of one and of two layers: each has several KV cache groups.
        ("pyramid-by-depth", POLICY | {"tiers": 4}),
        ("streaming", POLICY),
        ("snapkv", {"tiers": 2, "hit_split": "ignore"}),
        ("pyramid-by-depth", POLICY | {"exceed_length_to_compress": 4, "recent": 8}),
        ("pyramid-by-depth", POLICY | {"retention": 1.0}),
    ],
)
def test_hits_change_no_token(
    engine: Engine, policy: str, config: dict[str, Any]
) -> None:
    """The engine is compared with one without a prefix cache: cold, warm, and short of
    memory."""
    llm = engine(config, policy, enable_prefix_caching=False)
    expected = [g.tokens for g in generate(llm, PROMPTS, 40)]
    for memory in (16 * MIB, 3 * MIB):
        llm = engine(
            config,
            policy,
            enable_prefix_caching=None,
            kv_cache_memory_bytes=memory,
            max_num_batched_tokens=256,
            max_model_len=800,
            max_num_seqs=10,
            disable_log_stats=False,
        )
        for _ in range(2):
            before = num_hits(llm)
            assert [g.tokens for g in generate(llm, PROMPTS, 40)] == expected
            assert num_hits(llm) > before + 1000
        scheduler = scheduler_of(llm)
        scheduler.check_integrity()
        if config.get("retention") != 1.0:
            assert scheduler.kv_counters.num_compactions > len(PROMPTS)


def test_a_scorer_of_all_queries_takes_nothing_from_the_cache(engine: Engine) -> None:
    """It reads every query of a prompt, also those that a hit would spare."""
    config = {"tiers": 2, "hit_split": "ignore"}
    llm = engine(config, "h2o", enable_prefix_caching=False)
    expected = [g.tokens for g in generate(llm, PROMPTS, 24)]
    llm = engine(config, "h2o", enable_prefix_caching=True, disable_log_stats=False)
    before = num_hits(llm)
    for _ in range(2):
        assert [g.tokens for g in generate(llm, PROMPTS, 24)] == expected
    assert num_hits(llm) == before
    # Others may hit its pages.
    assert scheduler_of(llm).kv_counters.num_compactions > len(PROMPTS)


def test_shared_pages_are_never_written(engine: Engine) -> None:
    """A request that still computes its prompt reads the pages of one that compacts."""
    first, second = COMMON[:320], COMMON[:320] + random_prompts([600], seed=4)[0]
    llm = engine(POLICY, enable_prefix_caching=False)
    expected = [generate(llm, [prompt], 40)[0].tokens for prompt in (first, second)]
    llm = engine(POLICY, enable_prefix_caching=True, max_num_batched_tokens=160)
    scheduler = scheduler_of(llm)
    # One request is in the middle of its prompt, on the other's pages, when that one
    # compacts; both go on.
    outputs = generate(llm, [second, first], 40)
    assert [g.tokens for g in outputs] == expected[::-1]
    outputs = generate(llm, [first, second], 40)
    assert [g.tokens for g in outputs] == expected
    assert scheduler.kv_counters.num_compactions == 4
    scheduler.check_integrity()


def test_pages_of_a_compacted_prompt_stay_in_the_cache(tiny_llama: str) -> None:
    """All full pages of the prompt can be hit; the request itself holds copies."""
    scheduler = make_scheduler(tiny_llama, 200, SMALL, enable_prefix_caching=True)
    scheduler.add_request(make_request("a", 200, 30))
    driver = Driver(scheduler)
    plan = driver.step()
    pool = scheduler.kv_cache_manager.block_pool
    assert len(pool.cached_block_hash_to_block) == 200 // BLOCK_SIZE * 3
    held = held_pages(scheduler, "a")
    assert sum(held.values()) == 199 - free_pages(scheduler)
    (window,) = plan.windows
    assert window.pages is not None
    tables = [m.req_to_blocks["a"] for m in scheduler.tier_managers]
    for pages, table in zip(window.pages, tables, strict=True):
        assert pages == tuple(block.block_id for block in table)
        assert all(block.block_hash is None for block in table)
    # Generated tokens after an eviction are nobody else's.
    driver.run()
    assert len(pool.cached_block_hash_to_block) == 200 // BLOCK_SIZE * 3


def test_what_scores_is_computed_whatever_could_be_hit(tiny_llama: str) -> None:
    """The same prompt comes again: 16 queries score, so a hit ends before them."""
    scheduler = make_scheduler(tiny_llama, 300, SMALL, enable_prefix_caching=True)
    driver = Driver(scheduler)
    for name, computed in (("a", 200), ("b", 200 - 160)):
        scheduler.add_request(make_request(name, 200, 2))
        output_of = driver.step()
        assert output_of.num_prompt_tokens == computed
        driver.run()


def test_a_request_alone_compacts_in_its_own_pages(tiny_llama: str) -> None:
    """No page is free: the compaction gives up hashed pages instead of waiting."""
    scheduler = make_scheduler(
        tiny_llama, 7 * 3 + 1, SMALL, enable_prefix_caching=True, max_model_len=224
    )
    scheduler.add_request(make_request("a", 220, 4))
    driver = Driver(scheduler)
    assert free_pages(scheduler) == 21
    plan = driver.step()
    (window,) = plan.windows
    assert window.num_kept is not None
    assert sum(held_pages(scheduler, "a").values()) < 21
    pool = scheduler.kv_cache_manager.block_pool
    # Of 18 full pages those that were not written stay.
    assert 0 < len(pool.cached_block_hash_to_block) < 18
    driver.run()
    assert free_pages(scheduler) == 21


def test_sharers_short_of_pages_still_compact(tiny_llama: str) -> None:
    """A last chunk also needs the pages into which it gathers."""
    scheduler = make_scheduler(
        tiny_llama,
        40,
        SMALL | {"growth_reserve": 0},
        enable_prefix_caching=True,
        max_model_len=256,
    )
    requests = [make_request(str(i), 220, 30, shared=192) for i in range(8)]
    for request in requests:
        scheduler.add_request(request)
    driver = Driver(scheduler)
    driver.run()
    assert all(request.num_output_tokens == 30 for request in requests)
    windows = [window for plan in driver.plans for window in plan.windows]
    assert any(window.pages is not None for window in windows)
    assert scheduler.kv_counters.num_compactions >= 8


@pytest.mark.parametrize(
    "change", [{"prune_from": 0}, {"evict": "chunk"}], ids=["pruned", "chunk"]
)
def test_where_prompts_are_not_computed_whole_it_is_off(
    tiny_llama: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says why, whether it was asked for or is the default."""
    from pyramid_vllm import engine_args

    for asked, level in ((None, "info"), (True, "warning")):
        lines: list[str] = []
        monkeypatch.setattr(
            engine_args.logger, level, lambda line, *_, to=lines: to.append(line)
        )
        scheduler = make_scheduler(
            tiny_llama, 100, SMALL | change, enable_prefix_caching=asked
        )
        assert not scheduler.kv_cache_manager.enable_caching
        assert len([line for line in lines if "prefix caching" in line]) == 1


def test_a_plan_without_shared_pages_names_none(tiny_llama: str) -> None:
    scheduler = make_scheduler(tiny_llama, 100, SMALL)
    scheduler.add_request(make_request("a", 200, 2))
    plan = plan_of(scheduler.schedule())
    assert plan.windows[0].num_kept is not None
    assert plan.windows[0].pages is None
