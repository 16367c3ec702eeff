"""Laws of the counts, for any policy, model and length."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramid_vllm.policy import (
    KVPolicyError,
    LengthRule,
    MemoryModel,
    PolicyConfig,
    TierLayout,
    tier_layout,
)


@st.composite
def rules(draw: st.DrawFn) -> LengthRule:
    """Any rule that the settings allow."""
    num_layers = draw(st.integers(1, 80))
    retention = draw(st.floats(0.02, 1.0))
    config = PolicyConfig(
        name="drawn",
        retention=retention,
        shape=draw(st.sampled_from(["cosine", "linear"])),
        steepness=draw(st.floats(0, 1)),
        tiers=draw(
            st.one_of(st.integers(1, num_layers), st.sampled_from(["auto", "layers"]))
        ),
        sinks=draw(st.integers(0, 16)),
        recent=draw(st.integers(1, 200)),
        recent_ratio=draw(st.sampled_from([0.0, 0.5, 0.9])) * retention,
        min_context=draw(st.integers(0, 300)),
        evict=draw(st.sampled_from(["prompt_end", "chunk"])),
    )
    return LengthRule(config, tier_layout(config, num_layers))


def mean_over_layers(rule: LengthRule, counts: tuple[int, ...]) -> Fraction:
    kept = sum(map(int.__mul__, counts, rule.layout.sizes))
    return Fraction(kept, rule.layout.num_layers)


@settings(max_examples=400, deadline=None)
@given(rule=rules(), length=st.integers(0, 40_000))
def test_counts_are_integers_within_their_bounds(rule: LengthRule, length: int) -> None:
    """Never above the length, never below sinks and recent window, deeper is fewer."""
    counts = rule.cache_lengths(length)
    always = min(length, rule.config.sinks + rule.num_recent(length))
    assert len(counts) == rule.layout.num_tiers
    assert all(isinstance(count, int) for count in counts)
    assert all(always <= count <= length for count in counts)
    assert list(counts) == sorted(counts, reverse=True)


@settings(max_examples=400, deadline=None)
@given(rule=rules(), length=st.integers(0, 40_000))
def test_counts_grow_by_at_most_one_a_token(rule: LengthRule, length: int) -> None:
    """So what a later length keeps is always still there."""
    now, later = rule.cache_lengths(length), rule.cache_lengths(length + 1)
    assert all(0 <= b - a <= 1 for a, b in zip(now, later, strict=True))


@settings(max_examples=400, deadline=None)
@given(rule=rules(), length=st.integers(1, 40_000))
def test_the_mean_over_layers_meets_the_retention(
    rule: LengthRule, length: int
) -> None:
    """Within one token a layer, wherever the floor leaves room for it."""
    mean = mean_over_layers(rule, rule.cache_lengths(length))
    target = Fraction(rule.config.retention) * length
    if length >= rule.onset:
        assert abs(mean - target) <= 1
    else:
        assert mean == rule.floor(length)
        assert mean >= target - 1


@settings(max_examples=200, deadline=None)
@given(rule=rules(), prompt=st.integers(1, 5000), output=st.integers(0, 500))
def test_the_peak_bounds_every_step(rule: LengthRule, prompt: int, output: int) -> None:
    """No cut of the prompt into chunks holds more than the peak."""
    chunk = 1 + prompt // 3
    peak = rule.peak_lengths(prompt, prompt + output, chunk)
    held = (0,) * rule.layout.num_tiers
    ends = [
        *range(chunk, prompt, chunk),
        prompt,
        *range(prompt + 1, prompt + output + 1),
    ]
    before = 0
    for end in ends:
        during = [length + end - before for length in held]
        assert all(d <= p for d, p in zip(during, peak, strict=True))
        held, before = rule.held_lengths(prompt, end), end


@given(num_layers=st.integers(1, 100), length=st.integers(0, 10_000))
def test_retention_one_keeps_everything(num_layers: int, length: int) -> None:
    config = PolicyConfig(name="all", retention=1.0, tiers="layers", min_context=0)
    rule = LengthRule(config, tier_layout(config, num_layers))
    assert set(rule.cache_lengths(length)) == {length}


def test_steepness_makes_a_pyramid_and_zero_a_block() -> None:
    steep = LengthRule(PolicyConfig(name="a", steepness=1.0), TierLayout(30, 5))
    flat = LengthRule(PolicyConfig(name="b", steepness=0.0), TierLayout(30, 5))
    assert steep.cache_lengths(4096)[0] > 1.5 * steep.cache_lengths(4096)[-1]
    assert len(set(flat.cache_lengths(4096))) == 1


@pytest.mark.parametrize(
    ("num_layers", "tiers", "padding"),
    [(30, 5, 0), (32, 4, 0), (26, 4, 2), (61, 7, 2), (3, 3, 0)],
)
def test_auto_tiers_waste_little(num_layers: int, tiers: int, padding: int) -> None:
    layout = tier_layout(PolicyConfig(name="x", tiers="auto"), num_layers)
    assert (layout.num_tiers, layout.num_padding_layers) == (tiers, padding)
    assert sum(layout.sizes) == num_layers == len(layout.tier_of_layer)


def test_more_tiers_than_layers_are_refused() -> None:
    with pytest.raises(KVPolicyError, match=r"'tiers' is 31: valid is 1 to 30"):
        tier_layout(PolicyConfig(name="x", tiers=31), 30)


def test_a_model_without_full_attention_is_refused() -> None:
    with pytest.raises(KVPolicyError, match="this model has none"):
        tier_layout(PolicyConfig(name="x"), 0)


def test_memory_counts_whole_pages_of_every_tier() -> None:
    rule = LengthRule(
        PolicyConfig(
            name="x", retention=0.5, recent=8, sinks=0, min_context=0, tiers=2
        ),
        TierLayout(4, 2),
    )
    memory = MemoryModel(rule, block_size=16, layer_page_bytes=100)
    kept = rule.cache_lengths(200)
    pages = sum(-(-(length + 10) // 16) for length in kept)
    assert memory.request_bytes(200, 10) == pages * 2 * 100
    assert memory.stock_request_bytes(210) == 14 * 4 * 100
    assert memory.concurrency(100_000, 200, 10) > memory.stock_concurrency(100_000, 210)
