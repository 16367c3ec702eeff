"""From costs of layers to a suggested policy, and the command that writes it."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from pyramid_vllm.policy import (
    LengthRule,
    PolicyConfig,
    resolve_policy,
    tier_layout,
)
from pyramid_vllm.policy.profiles import IDENTITY
from pyramid_vllm.tools.analysis.found import Found
from pyramid_vllm.tools.analysis.settings import AnalyzeSettings
from pyramid_vllm.tools.analysis.suggest import convex, layer_shares, not_rising
from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.quality.words import sentences
from tests.models import TINY_LLAMA, save_tiny_llama

# Suggestions.


@st.composite
def measured(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Shares on the grid, rising, and any costs."""
    percents = draw(st.sets(st.integers(1, 99), min_size=2, max_size=7))
    cost = st.floats(-0.5, 5)
    size = len(percents)
    costs = draw(st.lists(cost, min_size=size, max_size=size))
    return [percent / 100 for percent in sorted(percents)], costs


@given(points=measured())
def test_curves_are_convex_and_fall(points: tuple[list[float], list[float]]) -> None:
    ratios, costs = points
    curve = convex(ratios, costs)
    assert curve.shape == (101,)
    assert curve[-1] == 0
    assert (np.diff(curve) <= 1e-9).all()
    assert (np.diff(curve, 2) >= -1e-7).all()
    for ratio, cost in zip(ratios, costs, strict=True):
        assert curve[round(100 * ratio)] <= max(cost, 0) + 1e-9


def test_convex_costs_are_met() -> None:
    curve = convex((0.2, 0.5), (1.1, 0.2))
    assert curve[[0, 20, 35, 50, 75, 100]] == pytest.approx(
        [1.7, 1.1, 0.65, 0.2, 0.1, 0]
    )
    # A point above the line between its neighbours is no part of the hull.
    assert convex((0.2, 0.4, 0.6), (1.0, 0.9, 0.2))[40] == pytest.approx(0.6)


@st.composite
def measured_layers(draw: st.DrawFn, num_layers: Any) -> tuple[list[float], np.ndarray]:
    count = draw(num_layers)
    ratios = [0.1, 0.3, 0.6]
    cost = st.floats(0, 3)
    rows = st.lists(cost, min_size=count, max_size=count)
    return ratios, np.array(draw(st.tuples(rows, rows, rows)))


@settings(max_examples=100)
@given(
    layers=measured_layers(st.integers(1, 12)),
    percent=st.integers(8, 100),
    size=st.integers(1, 4),
)
def test_shares_meet_the_retention(
    layers: tuple[list[float], np.ndarray], percent: int, size: int
) -> None:
    """The remainder is too small for another step of a whole tier."""
    ratios, costs = layers
    num_layers = costs.shape[1]
    tiers = [
        tuple(range(start, min(num_layers, start + size)))
        for start in range(0, num_layers, size)
    ]
    shares = layer_shares(ratios, costs, percent / 100, 0.08, tiers)
    assert len(shares) == num_layers
    assert all(0.08 - 1e-9 <= share <= 1 + 1e-9 for share in shares)
    left = percent / 100 * num_layers - sum(shares)
    assert -1e-9 <= left < 0.01 * size + 1e-9 or min(shares) > 1 - 1e-9
    for tier in tiers:
        assert len({shares[layer] for layer in tier}) == 1


@settings(max_examples=60)
@given(layers=measured_layers(st.just(2)), percent=st.integers(8, 100))
def test_no_other_split_costs_less(
    layers: tuple[list[float], np.ndarray], percent: int
) -> None:
    """Every split between two layers with the same sum costs as much or more."""
    ratios, costs = layers
    a, b = (convex(ratios, column) for column in costs.T)
    first, second = (
        round(100 * s) for s in layer_shares(ratios, costs, percent / 100, 0.08)
    )
    total = first + second
    splits = [
        a[one] + b[total - one] for one in range(8, 101) if 8 <= total - one <= 100
    ]
    assert a[first] + b[second] <= min(splits) + 1e-9


def test_the_layer_that_costs_most_gets_most() -> None:
    costs = np.array([[0.3, 3.0, 0.6], [0.1, 1.0, 0.2]])
    free = layer_shares((0.2, 0.5), costs, 0.4, 0.1)
    assert free[1] > free[2] >= free[0]
    first, second, third = layer_shares((0.2, 0.5), costs, 0.4, 0.1, [(0, 2), (1,)])
    assert second > first == third
    alike = layer_shares((0.2, 0.5), np.ones((2, 4)), 0.4, 0.1)
    assert alike == pytest.approx([0.4] * 4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([3, 2, 2, 1], [3, 2, 2, 1]),
        ([1, 2, 3], [2, 2, 2]),
        ([3, 1, 2], [3, 1.5, 1.5]),
        ([2, 1, 3, 4, 0], [2.5, 2.5, 2.5, 2.5, 0]),
    ],
)
def test_rising_values_are_pooled(values: list[float], expected: list[float]) -> None:
    assert not_rising(values) == pytest.approx(expected)


# The command.


def make_folder(folder: Path, num_layers: int) -> str:
    """A random Llama with a tokenizer of words."""
    words = WordLevel(unk_token="<unk>")
    model = Tokenizer(words)
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    lines = [*make_text(300).splitlines(), "0 1 2 3 4 5 6 7 8 9"]
    model.train_from_iterator(lines, WordLevelTrainer(special_tokens=["<unk>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    changes = {"num_hidden_layers": num_layers, "vocab_size": len(tokenizer)}
    save_tiny_llama(folder, TINY_LLAMA | changes)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_text(num_sentences: int) -> str:
    source = sentences(Random(0))
    return "\n".join(next(source) for _ in range(num_sentences))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_folder(tmp_path_factory.mktemp("words"), 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(make_text(120), encoding="utf-8")
    return path


#: Of one tier, with a window that leaves short prompts something to evict.
POLICY = {"name": "small", "base": "uniform", "recent": 16, "min_context": 24}


def analyze(folder: str, text: Path, *arguments: str) -> Any:
    options = {
        "--model": folder,
        "--text": str(text),
        "--kv-policy": json.dumps(POLICY),
        "--prompt-tokens": "200",
        "--target-tokens": "8",
        "--windows": "4",
        "--ratios": "0.6,0.3",
        "--needles": "1",
    } | dict(zip(arguments[::2], arguments[1::2], strict=True))
    words = [word for pair in options.items() for word in pair]
    return CliRunner().invoke(app, ["analyze", *words], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def analysis(
    folder: str, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """What the command printed, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("out") / "analysis"
    result = analyze(folder, text, "--out", str(out), "--retention", "0.45")
    assert result.exit_code == 0, result.output
    return result.stdout, out


def test_the_suggestion_is_the_policy_with_weights(analysis: tuple[str, Path]) -> None:
    """The file holds the whole policy, not its difference from the preset that files
    inherit from. It does not hold the policy's one tier, in which weights would have no
    effect."""
    suggested = resolve_policy(str(analysis[1] / "policy.yaml"))
    given = resolve_policy(POLICY, {"retention": 0.45})
    assert suggested is not None
    assert given is not None
    weights = suggested.given_weights
    assert weights is not None
    assert len(weights) == 4
    assert len(set(weights)) > 1
    assert np.mean(weights) == pytest.approx(0.45, abs=0.005)
    assert tier_layout(suggested, 4).num_tiers == len(set(weights))
    own = {"name", "layer_weights", "tiers"}
    assert suggested.model_dump(exclude=own) == given.model_dump(exclude=own)
    assert suggested.name == "small-suggested"


def test_the_profile_is_of_the_model(analysis: tuple[str, Path], folder: str) -> None:
    profile = yaml.safe_load((analysis[1] / "profile.yaml").read_text())
    config = json.loads((Path(folder) / "config.json").read_text())
    assert profile["model"] == {name: config[name] for name in IDENTITY}
    suggested = resolve_policy(str(analysis[1] / "policy.yaml"))
    assert suggested is not None
    assert tuple(profile["layer_weights"]) == suggested.given_weights


def test_results_hold_every_window(analysis: tuple[str, Path], text: Path) -> None:
    stdout, out = analysis
    results = json.loads((out / "results.json").read_text())
    costs = np.array(results["text_costs"])
    assert costs.shape == (2, 2, 4, 2), "windows, ratios, layers, loss and KL"
    assert (costs[:, 0, :, 1] > 0).all()
    assert costs[:, 0, :, 1].sum() > costs[:, 1, :, 1].sum(), "0.3 costs more than 0.6"
    assert results["settings"]["ratios"] == [0.3, 0.6]
    assert results["settings"]["text"] == str(text)
    assert {name: len(costs) for name, costs in results["trial"].items()} == {
        "small-suggested": 2,
        "small, no profile": 2,
    }
    assert all(c["divergence"] > 0 for c in results["trial"]["small-suggested"])
    assert results["trial"]["small-suggested"] != results["trial"]["small, no profile"]
    assert f"{len(results['needle_costs'])} of 1 needles were found" in stdout
    for word in ("30% kept", "suggested share", "top-1 agreement"):
        assert word in stdout


def found_with(policy: PolicyConfig, **changes: Any) -> Found:
    """An analysis whose third layer costs most."""
    options: dict[str, Any] = {"model": "m", "ratios": (0.2, 0.5)} | changes
    config = type("Config", (), {"num_hidden_layers": 4})
    costs = np.array([[0.3, 0.2, 2.0, 0.1], [0.1, 0.1, 0.5, 0.05]])
    both = np.stack((costs, costs), axis=-1)
    settings = AnalyzeSettings(**options)
    if settings.retention is not None:
        policy = policy.model_copy(update={"retention": settings.retention})
    return Found(settings, config, policy, [both])


@pytest.mark.parametrize("name", ["pyramidinfer", "pyramidkv", "h2o"])
def test_every_kind_of_policy_has_a_suggestion(name: str) -> None:
    """The suggestion has the budget that reads weights; if the policy prunes rows, the
    suggestion may prune them."""
    change = {"capacity": 512} if name == "pyramidkv" else None
    policy = resolve_policy(name, change)
    assert policy is not None
    found = found_with(policy, retention=0.45)
    suggested = found.suggested
    assert (suggested.budget, suggested.retention) == ("retention", 0.45)
    rule = LengthRule(suggested, tier_layout(suggested, 4))
    counts = rule.cache_lengths(4000)
    by_layer = [counts[tier] for tier in rule.layout.tier_of_layer]
    if policy.prune_from is None:
        assert max(by_layer) == by_layer[2] > min(by_layer)
    else:
        assert by_layer == sorted(by_layer, reverse=True)
        assert by_layer[0] > by_layer[-1]


def test_text_and_needles_weigh_the_same() -> None:
    """Text and needles count equally, however many of each were measured."""
    found = found_with(PolicyConfig(name="x"))
    (text,) = found.text_costs
    found.text_costs.append(3 * text)
    np.testing.assert_allclose(found.costs, 2 * text)
    found.needle_costs.append(10 * text)
    np.testing.assert_allclose(found.costs, 6 * text)


def test_the_policy_is_compared_as_it_is() -> None:
    """A policy with weights of its own keeps them, although the model has no
    profile."""
    policy = PolicyConfig(name="mine", layer_weights=[4, 3, 2, 1], retention=0.5)
    suggested, own, flat = found_with(policy, retention=0.3).compared()
    assert suggested.name == "mine-suggested"
    assert own.given_weights == (4, 3, 2, 1)
    assert flat.given_weights is None
    assert {c.retention for c in (suggested, own, flat)} == {0.3}
    plain = found_with(PolicyConfig(name="plain")).compared()
    assert [config.name for config in plain] == ["plain-suggested", "plain, no profile"]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--ratios", "0.5", ["ratios is '0.5'", "at least two"]),
        ("--ratios", "0,0.5", ["ratios is '0,0.5'", "between 0 and 1"]),
        ("--ratios", "0.5,1", ["ratios is '0.5,1'", "between 0 and 1"]),
        ("--ratios", "few,many", ["ratios is 'few,many'"]),
        ("--windows", "40", ["windows", "book.txt has", "valid is up to"]),
        ("--text-from", "0.98", ["book.txt has", "valid is up to 0 windows"]),
        ("--text", "/no/such/book.txt", ["/no/such/book.txt"]),
        ("--retention", "1.5", ["'retention' is 1.5"]),
        ("--retention", "0", ["'retention' is 0"]),
        ("--kv-policy", "none", ["kv_policy 'none'"]),
        ("--kv-policy", "pyramyd", ["'pyramyd'", "valid policies are"]),
        (
            "--kv-policy-config",
            '{"layer_weights": [1, 2]}',
            ["'layer_weights' has 2 numbers", "4 layers"],
        ),
    ],
)
def test_bad_options_are_named_before_the_model_loads(
    folder: str,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    option: str,
    value: str,
    words: list[str],
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("pyramid_vllm.tools.analysis.run.DenseModel", load)
    out = tmp_path / "out"
    result = analyze(folder, text, "--out", str(out), option, value)
    assert result.exit_code == 2, result.output
    message = " ".join(result.stderr.split())
    assert all(word in message for word in words), message
    assert not out.exists()


def test_ratios_are_sorted() -> None:
    settings = AnalyzeSettings(model="m", ratios="0.7, 0.1,0.7")  # type: ignore[arg-type]
    assert settings.ratios == (0.1, 0.7)
