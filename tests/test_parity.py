"""With `retention=1.0` the engine's outputs are stock vLLM's."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines import (
    Generation,
    close,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
)

LENGTHS = [1, 2, 5, 17, 31, 32, 33, 64, 70, 96, 127, 128, 200, 333, 512, 700]
CHUNKED = {"max_num_batched_tokens": 96, "max_num_seqs": 24}
WHOLE = {"max_num_batched_tokens": 2048, "enable_chunked_prefill": False}
NUM_TOKENS = 48


@pytest.fixture(scope="module", params=[CHUNKED, WHOLE], ids=["chunked", "whole"])
def stock(request: pytest.FixtureRequest, tiny_llama: str) -> Iterator[tuple[Any, Any]]:
    """The engine's settings and what stock vLLM generates with them."""
    llm = make_llm(tiny_llama, **request.param)
    assert not hasattr(scheduler_of(llm), "kv_rule"), "the policy is on"
    yield request.param, generate(llm, random_prompts(LENGTHS), NUM_TOKENS)
    close(llm)


def assert_same(ours: list[Generation], theirs: list[Generation]) -> None:
    assert len(ours) == len(theirs) == len(LENGTHS)
    for length, a, b in zip(LENGTHS, ours, theirs, strict=True):
        assert len(a.tokens) == NUM_TOKENS
        assert a.tokens == b.tokens, f"prompt of {length} tokens"
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("tiers", [1, 3, "layers"])
@pytest.mark.parametrize("evict", ["prompt_end", "chunk"])
def test_retention_one_is_stock(
    tiny_llama: str, stock: tuple[Any, Any], tiers: int | str, evict: str
) -> None:
    settings, expected = stock
    policy = {"retention": 1.0, "tiers": tiers, "evict": evict, "min_context": 0}
    llm = make_llm(
        tiny_llama, kv_policy="pyramid-by-depth", kv_policy_config=policy, **settings
    )
    try:
        assert_same(generate(llm, random_prompts(LENGTHS), NUM_TOKENS), expected)
        scheduler = scheduler_of(llm)
        assert len(scheduler.tier_managers) == {1: 1, 3: 3, "layers": 6}[tiers]
        assert scheduler.kv_counters.num_compactions == 0
        assert scheduler.kv_counters.max_num_running == len(LENGTHS)
        scheduler.check_integrity()
    finally:
        close(llm)


def test_a_stock_engine_after_ours_is_still_stock(
    tiny_llama: str, stock: tuple[Any, Any]
) -> None:
    """Our attention backend stays registered in the process: unbound, it is stock."""
    settings, expected = stock
    llm = make_llm(tiny_llama, **settings)
    try:
        assert_same(generate(llm, random_prompts(LENGTHS), NUM_TOKENS), expected)
    finally:
        close(llm)


def test_eviction_changes_outputs(tiny_llama: str, stock: tuple[Any, Any]) -> None:
    """The comparison above can fail: with less retention it fails."""
    settings, expected = stock
    llm = make_llm(
        tiny_llama,
        kv_policy="pyramid-by-depth",
        kv_policy_config={"retention": 0.3, "recent": 16, "min_context": 32},
        **settings,
    )
    try:
        ours = generate(llm, random_prompts(LENGTHS), NUM_TOKENS)
        assert scheduler_of(llm).kv_counters.num_compactions == sum(
            length > 32 for length in LENGTHS
        )
    finally:
        close(llm)
    same = [a.tokens == b.tokens for a, b in zip(ours, expected, strict=True)]
    short = [length <= 32 for length in LENGTHS]
    assert all(s for s, is_short in zip(same, short, strict=True) if is_short)
    assert not all(same)
