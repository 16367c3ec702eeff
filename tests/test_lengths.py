"""Laws of the counts, for any policy, model and length."""

from fractions import Fraction
from typing import Any

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
from pyramid_vllm.policy.budgets.retention import RetentionBudget


@st.composite
def rules(draw: st.DrawFn, budgets: tuple[str, ...] = ("retention",)) -> LengthRule:
    """Any rule that the settings allow."""
    num_layers = draw(st.integers(1, 80))
    retention = draw(st.floats(0.02, 1.0))
    config = PolicyConfig(
        name="drawn",
        budget=draw(st.sampled_from(budgets)),
        retention=retention,
        shape=draw(st.sampled_from(["cosine", "linear"])),
        steepness=draw(st.floats(0, 1)),
        prefill_decay_ratio=draw(st.floats(0, 1)),
        layerwise_downsample_interval=draw(st.integers(1, 4)),
        tiers=draw(
            st.one_of(st.integers(1, num_layers), st.sampled_from(["auto", "layers"]))
        ),
        sinks=draw(st.integers(0, 16)),
        recent=draw(st.integers(1, 200)),
        recent_ratio=draw(st.sampled_from([0.0, 0.5, 0.9])) * retention,
        min_context=draw(st.integers(0, 300)),
        evict=draw(st.sampled_from(["prompt_end", "chunk"])),
        prune_from=draw(st.one_of(st.none(), st.integers(0, num_layers))),
        exceed_length_to_compress=draw(st.one_of(st.none(), st.integers(2, 40))),
        gen_compress_ratio=draw(st.floats(0.1, 1)),
        gen_decay_ratio=draw(st.floats(0, 1)),
        gen_decay_strategy=draw(st.sampled_from(["cosine", "linear"])),
    )
    return LengthRule(config, tier_layout(config, num_layers))


any_rule = rules(("retention", "pyramidinfer"))


def retention_budget(rule: LengthRule) -> RetentionBudget:
    assert isinstance(rule.budget, RetentionBudget)
    return rule.budget


def mean_over_layers(rule: LengthRule, counts: tuple[int, ...]) -> Fraction:
    kept = sum(map(int.__mul__, counts, rule.layout.sizes))
    return Fraction(kept, rule.layout.num_layers)


@settings(max_examples=400, deadline=None)
@given(rule=any_rule, length=st.integers(0, 40_000))
def test_counts_are_integers_within_their_bounds(rule: LengthRule, length: int) -> None:
    """A count is at most the length and at least sinks and recent window; deeper tiers
    keep no more."""
    counts = rule.cache_lengths(length)
    always = min(length, rule.config.sinks + rule.num_recent(length))
    assert len(counts) == rule.layout.num_tiers
    assert all(isinstance(count, int) for count in counts)
    assert all(always <= count <= length for count in counts)
    assert list(counts) == sorted(counts, reverse=True)


@settings(max_examples=400, deadline=None)
@given(rule=any_rule, length=st.integers(0, 40_000))
def test_counts_grow_by_at_most_one_a_token(rule: LengthRule, length: int) -> None:
    """So a shorter prompt's cache still holds what a longer one keeps."""
    now, later = rule.cache_lengths(length), rule.cache_lengths(length + 1)
    assert all(0 <= b - a <= 1 for a, b in zip(now, later, strict=True))


@settings(max_examples=400, deadline=None)
@given(rule=rules(), length=st.integers(1, 40_000))
def test_the_mean_over_layers_meets_the_retention(
    rule: LengthRule, length: int
) -> None:
    """It is within one token a layer, wherever the floor leaves room for it."""
    mean = mean_over_layers(rule, rule.cache_lengths(length))
    target = Fraction(rule.config.retention) * length
    if length >= retention_budget(rule).onset:
        assert abs(mean - target) <= 1
    else:
        assert mean == retention_budget(rule).floor(length)
        assert mean >= target - 1


@settings(max_examples=300, deadline=None)
@given(
    rule=any_rule,
    prompt=st.integers(1, 3000),
    output=st.integers(0, 300),
    cut=st.integers(1, 5),
    pruned=st.booleans(),
)
def test_the_peak_bounds_every_step(
    rule: LengthRule, prompt: int, output: int, cut: int, pruned: bool
) -> None:
    """No cut of the prompt into chunks holds more than the peak."""
    chunk = 1 + prompt // cut
    peak = rule.peak_lengths(prompt, prompt + output, chunk, pruned)
    held = (0,) * rule.layout.num_tiers
    ends = [
        *range(chunk, prompt, chunk),
        prompt,
        *range(prompt + 1, prompt + output + 1),
    ]
    before = 0
    for end in ends:
        rows = (end - before,) * rule.layout.num_tiers
        if pruned and end <= prompt:
            rows = rule.num_rows(before, end)
        during = [length + row for length, row in zip(held, rows, strict=True)]
        assert all(d <= p for d, p in zip(during, peak, strict=True))
        held, before = rule.held_lengths(prompt, end), end
        assert all(h <= d for h, d in zip(held, during, strict=True))


@settings(max_examples=300, deadline=None)
@given(rule=any_rule, before=st.integers(0, 3000), chunk=st.integers(1, 3000))
def test_rows_are_what_a_tier_still_needs(
    rule: LengthRule, before: int, chunk: int
) -> None:
    """Deeper tiers compute fewer rows. Rows are never fewer than the recent window or
    than the growth of the count, and exactly the count where the chunk is the whole
    prompt."""
    after = before + chunk
    rows, first = rule.num_rows(before, after), rule.first_pruned_tier
    assert rows[:first] == (chunk,) * first
    assert list(rows) == sorted(rows, reverse=True)
    grown = zip(rule.cache_lengths(before), rule.cache_lengths(after), strict=True)
    recent = min(chunk, rule.num_recent(after))
    for row, (a, b) in zip(rows, grown, strict=True):
        assert max(recent, b - a) <= row <= chunk
    whole = rule.num_rows(0, after)
    assert whole[first:] == rule.cache_lengths(after)[first:]


@settings(max_examples=300, deadline=None)
@given(rule=any_rule, prompt=st.integers(1, 3000), output=st.integers(0, 600))
def test_generated_tokens_leave_in_groups(
    rule: LengthRule, prompt: int, output: int
) -> None:
    """A step adds its token, and generated tokens are compressed at most once in it;
    the window always stays."""
    now = rule.held_lengths(prompt, prompt + output)
    later = rule.held_lengths(prompt, prompt + output + 1)
    group = rule.config.exceed_length_to_compress
    if group is None:
        assert later == tuple(length + 1 for length in now)
        return
    gone = {a + 1 - b for a, b in zip(now, later, strict=True)}
    assert gone in ({0}, {group - kept for kept in rule.group_kept})
    kept = rule.cache_lengths(prompt)
    window = min(output, rule.num_recent(prompt + output))
    assert all(a >= b + window for a, b in zip(now, kept, strict=True))
    assert all(1 <= count <= group for count in rule.group_kept)


@given(
    num_layers=st.integers(2, 80),
    retention=st.floats(0.5, 1.0),
    interval=st.integers(1, 3),
    length=st.integers(500, 40_000),
)
def test_the_decay_is_solved_from_the_retention(
    num_layers: int, retention: float, interval: int, length: int
) -> None:
    config = PolicyConfig(
        name="solved",
        budget="pyramidinfer",
        retention=retention,
        layerwise_downsample_interval=interval,
        tiers="layers",
        recent=1,
        recent_ratio=0.2,
        min_context=0,
    )
    rule = LengthRule(config, tier_layout(config, num_layers))
    try:
        mean = mean_over_layers(rule, rule.cache_lengths(length))
    except KVPolicyError as error:
        least = float(str(error).split(" is ")[-1].split()[0])
        assert least > retention - 1e-3
        return
    # A layer loses up to one token to rounding, and hands the loss on.
    assert abs(float(mean) - retention * length) <= num_layers + 1


def test_pyramidinfer_shrinks_as_published() -> None:
    """By hand: 100 tokens, 21 recent, of the other 79 layers compute 79, 79 * r(0),
    79 * r(0) * r(1) and so on, with r(i) = 0.4 * (cos(pi * i / 4) + 1) / 2 + 0.6."""
    config = PolicyConfig(
        name="x",
        budget="pyramidinfer",
        prefill_decay_ratio=0.6,
        tiers="layers",
        recent=1,
        recent_ratio=0.2,
        min_context=8,
    )
    rule = LengthRule(config, tier_layout(config, 4))
    # r = 1, 0.9414, 0.8, 0.6586
    assert rule.cache_lengths(100) == (100, 100, 21 + 74, 21 + 59)
    assert rule.cache_lengths(12) == (12, 12, 11, 11)
    every_second = config.model_copy(update={"layerwise_downsample_interval": 2})
    rule = LengthRule(every_second, tier_layout(every_second, 4))
    assert rule.cache_lengths(100) == (100, 100, 100, 21 + 63)


def test_pyramidkv_budgets_lie_on_a_line_of_fixed_total() -> None:
    config = PolicyConfig(
        name="x",
        budget="arithmetic",
        capacity=110,
        beta=5,
        tiers="layers",
        sinks=0,
        recent=10,
        min_context=0,
    )
    rule = LengthRule(config, tier_layout(config, 5))
    assert rule.cache_lengths(1000) == (190, 150, 110, 70, 30)
    assert rule.cache_lengths(150) == (150, 130, 110, 90, 70)
    assert rule.cache_lengths(110) == (110,) * 5


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


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"steepness": 0.0}, (6,)),
        ({"retention": 1.0, "steepness": 1.0}, (6,)),
        ({"layer_weights": (1.0, 4.0, 1.0, 4.0, 1.0, 1.0)}, (2, 4)),
        # Both heavy kinds keep everything.
        ({"layer_weights": (1.0, 8.0, 1.0, 9.0, 1.0, 1.0)}, (2, 4)),
        ({"steepness": 0.0, "tiers": "layers"}, (1,) * 6),
        # Pruning happens between tiers.
        ({"steepness": 0.0, "prune_from": 2}, (2, 2, 1, 1)),
    ],
)
def test_layers_with_equal_shares_are_one_tier(
    settings: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    config = PolicyConfig(name="x", **settings)
    assert tier_layout(config, 6).sizes == sizes


def test_equal_shares_that_would_waste_memory_are_not_one_tier() -> None:
    """A tier of one layer beside one of 29 would make thirty groups."""
    config = PolicyConfig(name="x", layer_weights=(4.0,) + (1.0,) * 29)
    assert tier_layout(config, 30).num_tiers == 6


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


def test_queries_are_a_share_of_the_prompt() -> None:
    """They are at least the recent window and at most what the setting says."""
    settings = {"recent": 64, "queries": 256, "query_ratio": 0.125}
    config = PolicyConfig(name="x", **settings)
    rule = LengthRule(config, tier_layout(config, 4))
    lengths = (10, 64, 400, 1000, 1024, 2048, 9000)
    assert [rule.num_queries(n) for n in lengths] == [10, 64, 64, 125, 128, 256, 256]
    pruned = config.model_copy(update={"prune_from": 0})
    rule = LengthRule(pruned, tier_layout(pruned, 4))
    assert [rule.num_queries(n) for n in lengths] == [10, 64, 64, 64, 64, 64, 64]
