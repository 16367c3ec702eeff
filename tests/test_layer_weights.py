"""Weights of layers in place of depth, their tiers, and models' profiles."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from pyramid_vllm.policy import (
    KVPolicyError,
    LengthRule,
    PolicyConfig,
    RequestPolicies,
    fitted,
    profile_weights,
    profiles,
    resolve_policy,
    tier_layout,
)
from pyramid_vllm.policy.presets import config_dir
from pyramid_vllm.policy.tiers import runs
from tests.engines import (
    close,
    drain,
    held_kv,
    make_llm,
    random_prompts,
    scheduler_of,
    start,
    worker_of,
)
from tests.models import save_tiny
from tests.oracle import DenseModel, Oracle
from tests.oracle.counts import LayerCounts
from tests.test_oracle import compare

WEIGHTS = (1.0, 4.0, 2.0, 4.0, 1.0, 2.0)
PROFILES = sorted(config_dir("profiles").glob("*.yaml"))


def rule_of(num_layers: int | None = None, **changes: Any) -> LengthRule:
    config = PolicyConfig(name="weighted", **changes)
    count = num_layers or len(config.given_weights or ())
    return LengthRule(config, tier_layout(config, count))


@st.composite
def rules(draw: st.DrawFn) -> LengthRule:
    """Any rule by weight whose tiers may be of any layers."""
    weights = draw(st.lists(st.floats(0.01, 100), min_size=1, max_size=48))
    num_layers, retention = len(weights), draw(st.floats(0.05, 1.0))
    return rule_of(
        layer_weights=weights,
        retention=retention,
        tiers=draw(
            st.one_of(st.integers(1, num_layers), st.sampled_from(["auto", "layers"]))
        ),
        sinks=draw(st.integers(0, 16)),
        recent=draw(st.integers(1, 100)),
        recent_ratio=draw(st.sampled_from([0.0, 0.5, 0.9])) * retention,
        min_context=draw(st.integers(0, 200)),
    )


def by_layer(rule: LengthRule, num_tokens: int) -> list[int]:
    counts = rule.cache_lengths(num_tokens)
    return [counts[tier] for tier in rule.layout.tier_of_layer]


@settings(max_examples=200)
@given(rule=rules())
def test_tiers_are_cut_by_falling_weight(rule: LengthRule) -> None:
    """Every layer lies in one tier, and no tier's layer outweighs an earlier tier's."""
    layout, weights = rule.layout, rule.config.given_weights
    assert weights is not None
    layers = [layer for tier in layout.layers for layer in tier]
    assert sorted(layers) == list(range(len(weights)))
    assert tuple(map(len, layout.layers)) == layout.sizes
    for tier, members in enumerate(layout.layers):
        assert list(members) == sorted(members)
        assert {layout.tier_of_layer[layer] for layer in members} == {tier}
    tiers = [[weights[layer] for layer in tier] for tier in layout.layers]
    for heavy, light in pairwise(tiers):
        assert min(heavy) >= max(light)


@settings(max_examples=300)
@given(rule=rules(), past=st.integers(0, 40_000))
def test_the_mean_over_layers_meets_the_retention(rule: LengthRule, past: int) -> None:
    """The mean is within a token, whatever the weights; only the floor raises it."""
    budget: Any = rule.budget
    length = budget.onset + past
    layers = by_layer(rule, length)
    above = (
        Fraction(sum(layers), len(layers)) - Fraction(rule.config.retention) * length
    )
    assert above >= -1
    assert above <= 1 or min(layers) == budget.floor(length)


@settings(max_examples=300)
@given(rule=rules(), length=st.integers(0, 20_000))
def test_counts_keep_to_their_bounds(rule: LengthRule, length: int) -> None:
    """They do not rise from tier to tier, and grow by none or one with the prompt."""
    now, later = rule.cache_lengths(length), rule.cache_lengths(length + 1)
    assert list(now) == sorted(now, reverse=True)
    assert all(rule.budget.always(length) <= count <= length for count in now)
    assert all(0 <= b - a <= 1 for a, b in zip(now, later, strict=True))


@settings(max_examples=100)
@given(rule=rules(), length=st.integers(0, 5000))
def test_counts_are_those_of_the_exact_scale(rule: LengthRule, length: int) -> None:
    """Against fractions; a billionth of rounding may move a count by one."""
    exact = LayerCounts(rule.config, rule.layout.num_layers, rule.layout.sizes)
    assert tuple(exact.tier) == rule.layout.tier_of_layer
    pairs = zip(by_layer(rule, length), exact.prompt(length), strict=True)
    assert all(abs(a - b) <= 1 for a, b in pairs)


def test_shares_are_in_proportion_until_a_layer_keeps_all() -> None:
    plain = {"tiers": "layers", "sinks": 0, "recent": 1, "min_context": 0}
    # Layers keep 0.15, 0.3 and 0.45 of it.
    rule = rule_of(layer_weights=[1, 2, 3], retention=0.3, **plain)
    assert by_layer(rule, 1004) == [150, 301, 451]
    # The last would keep 1.25 of it; what it cannot take, the others get.
    rule = rule_of(layer_weights=[1, 1, 10], retention=0.5, **plain)
    assert by_layer(rule, 1002) == [250, 250, 1002]
    # None keeps less than its recent window.
    rule = rule_of(layer_weights=[1, 100], retention=0.3, recent_ratio=0.2, **plain)
    assert by_layer(rule, 1010) == [203, 404]


def test_what_a_user_asks_for_goes_before_a_profile() -> None:
    """A shape replaces the preset's weights. Where prompts are pruned, tiers have to
    follow depth."""
    for change in ({"steepness": 0.5}, {"shape": "linear"}):
        policy = resolve_policy("pyramid", change)
        assert policy is not None
        assert fitted(policy, (1.0, 2.0)).given_weights is None
    both = resolve_policy("pyramid", {"steepness": 0.5, "layer_weights": [1, 2]})
    assert both is not None
    assert both.given_weights == (1.0, 2.0)
    pruned = resolve_policy("pyramid", {"prune_from": 0})
    assert pruned is not None
    assert fitted(pruned, (1.0, 2.0)).layer_weights is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_weights": [1, 0, 1]}, ["'layer_weights'", "greater than 0"]),
        ({"layer_weights": [1, -2]}, ["'layer_weights'", "greater than 0"]),
        ({"layer_weights": [1, float("inf")]}, ["'layer_weights'", "finite"]),
        ({"layer_weights": "some"}, ["'layer_weights' is 'some'", "'auto'"]),
        (
            {"layer_weights": [1, 2], "budget": "arithmetic"},
            ["layer_weights", "only with budget='retention'"],
        ),
        (
            {"layer_weights": [1, 2], "budget": "pyramidinfer"},
            ["layer_weights", "only with budget='retention'"],
        ),
    ],
)
def test_bad_weights_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(KVPolicyError) as error:
        resolve_policy("uniform", changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("num_layers", [5, 7])
def test_weights_of_another_model_are_refused(num_layers: int) -> None:
    with pytest.raises(KVPolicyError) as error:
        rule_of(num_layers, layer_weights=WEIGHTS)
    message = str(error.value)
    assert "'layer_weights' has 6 numbers" in message
    assert f"valid is one for each of the model's {num_layers} layers" in message


@pytest.mark.parametrize("prune_from", [0, 2, 3])
def test_pruning_keeps_tiers_by_depth(prune_from: int) -> None:
    """Later layers lack the rows that a layer drops, so weights may not rise there.
    They may rise before the first pruned layer."""
    falling = {"tiers": 3, "prune_from": prune_from, "retention": 0.4}
    rule = rule_of(layer_weights=[4, 4, 3, 2, 2, 1], **falling)
    assert rule.layout.layers == ((0, 1), (2, 3), (4, 5))
    assert rule.prunes
    counts = by_layer(rule, 2000)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    with pytest.raises(KVPolicyError) as error:
        rule_of(layer_weights=[4, 4, 2, 2, 3, 3], **falling).cache_lengths(2000)
    for word in ("'layer_weights' rises at layer 4", f"prune_from={prune_from}"):
        assert word in str(error.value)


def test_weights_may_rise_before_pruned_layers() -> None:
    rising = {"layer_weights": [1, 1, 4, 4, 2, 2], "tiers": 3, "retention": 0.4}
    rule = rule_of(prune_from=4, **rising)
    first, second, third = rule.cache_lengths(2000)
    assert second > third > first
    assert rule.num_rows(0, 2000) == (2000, 2000, third)
    with pytest.raises(KVPolicyError, match="rises at layer 2"):
        rule_of(prune_from=2, **rising).cache_lengths(2000)


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((), ""),
        ((5,), "5"),
        ((0, 1, 2, 3, 7), "0-3, 7"),
        ((1, 3, 4, 9, 10), "1, 3-4, 9-10"),
    ],
)
def test_layers_for_people(layers: tuple[int, ...], text: str) -> None:
    assert runs(layers) == text


# Profiles.


@settings(max_examples=50)
@given(length=st.integers(0, 5000), steepness=st.floats(0, 1))
def test_auto_without_a_profile_is_by_depth(length: int, steepness: float) -> None:
    depth = rule_of(12, steepness=steepness, tiers=4)
    auto = rule_of(12, steepness=steepness, tiers=4, layer_weights="auto")
    assert auto.layout == depth.layout
    assert auto.cache_lengths(length) == depth.cache_lengths(length)
    assert fitted(auto.config, None) == depth.config


def test_auto_becomes_the_models_weights() -> None:
    auto = PolicyConfig(name="x", layer_weights="auto")
    assert fitted(auto, WEIGHTS).given_weights == WEIGHTS
    given = PolicyConfig(name="x", layer_weights=[1, 2, 3])
    assert fitted(given, WEIGHTS) == given
    none = PolicyConfig(name="x")
    assert fitted(none, WEIGHTS) == none


@pytest.mark.parametrize("budget", ["arithmetic", "pyramidinfer"])
def test_auto_is_nothing_to_budgets_by_depth(budget: str) -> None:
    auto = PolicyConfig(name="x", budget=budget, layer_weights="auto", tiers=3)
    plain = auto.model_copy(update={"layer_weights": None})
    assert fitted(auto, WEIGHTS) == plain
    assert tier_layout(fitted(auto, WEIGHTS), 6).order is None


def test_requests_know_the_models_weights() -> None:
    """A preset with ``auto`` is served by weight, in the engine's tiers."""
    pyramid = resolve_policy("pyramid")
    assert pyramid is not None
    assert pyramid.layer_weights == "auto"
    auto = PolicyConfig(name="x", layer_weights="auto", tiers=pyramid.tiers)
    known = RequestPolicies(fitted(auto, WEIGHTS), len(WEIGHTS), WEIGHTS)
    counts = by_layer(known.rule_for({"kv_policy": "pyramid"}), 3000)
    assert counts[1] == counts[3] > counts[2] == counts[5] > counts[0] == counts[4]
    unknown = RequestPolicies(fitted(auto, None), len(WEIGHTS))
    assert unknown.valid["pyramid"].layer_weights is None


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_profiles_are_of_one_model(path: Path) -> None:
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(profile) == {"model", "layer_weights"}
    assert set(profile["model"]) == set(profiles.IDENTITY)
    weights = profile["layer_weights"]
    assert len(weights) == profile["model"]["num_hidden_layers"]
    assert all(weight > 0 for weight in weights)
    assert profile_weights(SimpleNamespace(**profile["model"])) == tuple(weights)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", len(WEIGHTS))


@pytest.fixture(scope="module")
def profile_of_model(
    model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A folder with a profile of the tiny model, in place of the shipped ones."""
    folder = tmp_path_factory.mktemp("profiles")
    config = AutoConfig.from_pretrained(model)
    identity = {name: getattr(config, name) for name in profiles.IDENTITY}
    content = {"model": identity, "layer_weights": list(WEIGHTS)}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "config_dir", lambda name: folder)
        profiles._profiles.cache_clear()
        yield config
    profiles._profiles.cache_clear()


@pytest.mark.parametrize("setting", profiles.IDENTITY)
def test_a_profile_is_of_models_like_its_own(
    profile_of_model: Any, setting: str
) -> None:
    assert profile_weights(profile_of_model) == WEIGHTS
    settings = {n: getattr(profile_of_model, n) for n in profiles.IDENTITY}
    tuned = SimpleNamespace(**settings, name_or_path="fine-tuned")
    assert profile_weights(tuned) == WEIGHTS
    other = SimpleNamespace(**(settings | {setting: "another"}))
    assert profile_weights(other) is None


# An engine.


@pytest.fixture(scope="module")
def llm(model: str, profile_of_model: Any) -> Iterator[Any]:
    """An engine whose policy takes the weights from the model's profile."""
    config = {
        "layer_weights": "auto",
        "retention": 0.4,
        "tiers": 3,
        "recent": 24,
        "min_context": 40,
    }
    made = make_llm(
        model, kv_policy="uniform", kv_policy_config=config, max_num_batched_tokens=4096
    )
    yield made
    close(made)


def test_groups_are_of_layers_with_like_weights(llm: Any) -> None:
    assert worker_of(llm).kv_policy.layer_weights == WEIGHTS
    groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
    names = {tuple(sorted(group.layer_names)) for group in groups}
    expected = [
        tuple(f"model.layers.{layer}.self_attn.attn" for layer in layers)
        for layers in ((1, 3), (2, 5), (0, 4))
    ]
    assert names == set(expected)
    tiers = {group.kv_cache_spec.tier: sorted(group.layer_names) for group in groups}
    assert tiers == {tier: list(layers) for tier, layers in enumerate(expected)}


def test_heavier_layers_hold_more(llm: Any) -> None:
    prompts = random_prompts([300, 640], vocab_size=1024)
    scheduler = scheduler_of(llm)
    before = scheduler.kv_counters.num_compactions
    for req_id, prompt in zip(start(llm, prompts, 8), prompts, strict=True):
        held = [len(held_kv(llm, req_id, layer)[0]) for layer in range(len(WEIGHTS))]
        assert held[1] == held[3] > held[2] == held[5] > held[0] == held[4]
        assert abs(sum(held) / len(held) - 0.4 * len(prompt)) <= 2
    drain(llm)
    assert scheduler.kv_counters.num_compactions == before + len(prompts)


@pytest.mark.parametrize("chunk", [128, 4096])
def test_the_engine_equals_the_oracle(llm: Any, model: str, chunk: int) -> None:
    oracle = Oracle(DenseModel(model), worker_of(llm).kv_policy)
    assert oracle.counts.tier == [2, 0, 1, 0, 2, 1]
    compare(llm, oracle, chunk)
