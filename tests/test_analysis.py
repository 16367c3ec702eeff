"""What a policy costs, on transformers' models: against the oracle and by hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pyramid_vllm.policy import (
    LengthRule,
    PolicyConfig,
    tier_layout,
)
from pyramid_vllm.tools.analysis.choice import gathered
from pyramid_vllm.tools.analysis.dense import DenseModel
from pyramid_vllm.tools.analysis.hypotheses import Continuation
from tests.models import save_tiny
from tests.oracle import DenseModel as OracleModel
from tests.oracle import Oracle

NUM_LAYERS = 6
FAMILIES = ("llama", "qwen2", "qwen3")
NUM_PROMPT, NUM_TARGET = 260, 24
#: Small enough for the prompt to lose tokens in every layer.
SMALL = {"retention": 0.4, "tiers": 3, "sinks": 4, "recent": 16, "min_context": 24}
POLICIES: dict[str, dict[str, Any]] = {
    "layer": {"steepness": 0.8},
    "head": {"steepness": 0.8, "selection": "head", "pooling": "avg"},
    "weights": {"layer_weights": (1.0, 4.0, 2.0, 4.0, 1.0, 2.0), "selection": "head"},
    "pruned": {"steepness": 0.8, "prune_from": 2},
    "pruned-weights": {
        "layer_weights": (4.0, 4.0, 3.0, 2.0, 2.0, 1.0),
        "tiers": "layers",
        "prune_from": 3,
        "selection": "head",
    },
    "queries": {"queries": 40, "pooling": "max", "selection": "head"},
    "pruned-queries": {"steepness": 0.8, "prune_from": 2, "queries": 40},
    "accumulated": {"steepness": 0.8, "scorer": "accumulated", "selection": "head"},
    "key_norm": {"scorer": "key_norm", "tiers": "layers"},
}


def rule_of(**changes: Any) -> LengthRule:
    config = PolicyConfig(name="tried", **(SMALL | changes))
    return LengthRule(config, tier_layout(config, NUM_LAYERS))


@dataclass(frozen=True)
class Models:
    """One model as the analysis, the oracle and transformers have it."""

    ours: DenseModel
    oracle: OracleModel
    plain: Any


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    made = {}
    for family in FAMILIES:
        path = save_tiny(tmp_path_factory.mktemp(family), family, NUM_LAYERS)
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        made[family] = Models(DenseModel(path), OracleModel(path), plain)
    return made


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """A prompt of different tokens: equal tokens have keys of the same length."""
    return np.random.default_rng(6).permutation(1024)[:NUM_PROMPT].tolist()


@pytest.fixture(scope="module")
def target() -> list[int]:
    return np.random.default_rng(5).integers(0, 1024, NUM_TARGET).tolist()


def full_logprobs(
    model: Any, prompt: Sequence[int], target: Sequence[int]
) -> torch.Tensor:
    """Plain transformers: one forward pass over prompt and target."""
    ids = torch.tensor([[*prompt, *target[:-1]]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits, dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_cache_is_plain_transformers(
    models: dict[str, Models], family: str, prompt: list[int], target: list[int]
) -> None:
    found = models[family]
    full = found.ours.prefill(prompt, 8)
    assert [layer.key.shape[1] for layer in full.layers] == [NUM_PROMPT] * NUM_LAYERS
    assert {len(layer.query) for layer in full.layers} == {8}
    ours = found.ours.continued(full, target)
    assert ours.shape == (NUM_TARGET, 1024)
    expected = full_logprobs(found.plain, prompt, target)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_evicted_cache_is_the_oracles(
    models: dict[str, Models],
    family: str,
    policy: str,
    prompt: list[int],
    target: list[int],
) -> None:
    """Counts of every layer and probabilities of every token after the prompt are the
    oracle's."""
    found, rule = models[family], rule_of(**POLICIES[policy])
    window = Continuation(found.ours, prompt, target, [rule])
    kept = found.ours.kept(window.full, rule)
    expected = Oracle(found.oracle, rule.config).run(prompt, [NUM_PROMPT], target)
    assert expected.decided
    held = [layer.key.shape[1] + NUM_TARGET - 1 for layer in kept.layers]
    assert held == expected.held
    assert max(held) < NUM_PROMPT, "nothing was evicted"
    ours = found.ours.continued(kept, target)
    theirs = torch.stack(expected.logprobs).float()
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    full = full_logprobs(found.plain, prompt, target)
    assert float((ours[1:] - full[1:]).abs().max()) > 1e-2, "the comparison sees none"
    # The first token is sampled before anything is evicted, but not before pruning.
    same = torch.allclose(ours[0], full[0], atol=1e-3)
    assert same != rule.prunes


@contextmanager
def recorded_angles(model: DenseModel) -> Iterator[dict[int, torch.Tensor]]:
    """By layer: the rotation of the rows that it computed last, ``[rows, size]``."""
    angles: dict[int, torch.Tensor] = {}

    def record(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cos, sin = kwargs["position_embeddings"]
            angles[layer] = torch.cat((cos[0], sin[0]), dim=-1)

        return hook

    stack = model.model.get_decoder().layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(record(index), with_kwargs=True)
        for index, layer in enumerate(stack)
    ]
    try:
        yield angles
    finally:
        for hook in hooks:
            hook.remove()


def test_pruned_rows_never_come_back(
    models: dict[str, Models], prompt: list[int]
) -> None:
    """Layers compute the rule's rows, each a part of the layer's before, and hold
    no others."""
    model, rule = models["llama"].ours, rule_of(steepness=0.8, prune_from=2)
    with recorded_angles(model) as angles:
        full = model.prefill(prompt, 16)
        whole = angles[0]
        angles.clear()
        kept = model.kept(full, rule)
    rows = {
        layer: [int((whole == row).all(dim=1).nonzero()) for row in angle]
        for layer, angle in angles.items()
    }
    counts = rule.num_rows(0, NUM_PROMPT)
    tiers = rule.layout.tier_of_layer
    assert [len(rows[layer]) for layer in rows] == [counts[tiers[i]] for i in rows]
    assert len(rows[1]) == NUM_PROMPT > len(rows[2]) == len(rows[3]) > len(rows[4])
    always = {*range(4), *range(NUM_PROMPT - 16, NUM_PROMPT)}
    for before, after in pairwise(sorted(rows)):
        assert rows[after] == sorted(rows[after])
        assert always <= set(rows[after]) <= set(rows[before])
    assert [kept.layers[i].key.shape[1] for i in (2, 3, 4, 5)] == [
        len(rows[i]) for i in (2, 3, 4, 5)
    ]
    # The first pruned layer's keys are those of its rows in the full cache.
    torch.testing.assert_close(kept.layers[2].key, full.layers[2].key[:, rows[2]])


def test_a_pruned_run_leaves_the_model_as_it_was(
    models: dict[str, Models], prompt: list[int], target: list[int]
) -> None:
    found = models["llama"]
    rule = rule_of(prune_from=2)
    window = Continuation(found.ours, prompt, target, [rule])
    assert window.policy_cost(rule).divergence > 1e-3
    assert found.ours.num_layers == found.ours.model.config.num_hidden_layers == 6
    again = found.ours.continued(found.ours.prefill(prompt, 1), target)
    expected = full_logprobs(found.plain, prompt, target)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=0)


# What layers cost.


def test_keeping_everything_costs_nothing(
    models: dict[str, Models], prompt: list[int], target: list[int]
) -> None:
    found, everything = models["llama"], rule_of(retention=1.0)
    window = Continuation(found.ours, prompt, target, [everything])
    expected = full_logprobs(found.plain, prompt, target)
    loss = -float(expected[range(NUM_TARGET), target].mean())
    assert window.loss == pytest.approx(loss, abs=1e-4)
    for cost in (window.cost(window.full), window.policy_cost(everything)):
        assert cost.loss == pytest.approx(0, abs=1e-6)
        assert cost.divergence == pytest.approx(0, abs=1e-6)
        assert cost.agreement == 1


def test_costs_are_those_of_the_changed_distribution(
    models: dict[str, Models], prompt: list[int], target: list[int]
) -> None:
    """Costs follow the formulas, applied to the oracle's and transformers'
    probabilities."""
    found, rule = models["qwen2"], rule_of(steepness=0.8)
    window = Continuation(found.ours, prompt, target, [rule])
    cost = window.policy_cost(rule)
    run = Oracle(found.oracle, rule.config).run(prompt, [NUM_PROMPT], target)
    evicted = torch.stack(run.logprobs)
    full = full_logprobs(found.plain, prompt, target).double()
    rise = (full - evicted)[range(NUM_TARGET), target].mean()
    divergence = torch.nn.functional.kl_div(
        evicted, full, log_target=True, reduction="batchmean"
    )
    agreement = np.mean(
        [int(a.argmax() == b.argmax()) for a, b in zip(evicted, full, strict=True)]
    )
    assert cost.loss == pytest.approx(float(rise), abs=1e-4)
    assert cost.divergence == pytest.approx(float(divergence), abs=1e-4)
    assert cost.divergence > 1e-2
    assert cost.agreement == pytest.approx(float(agreement))


def test_certain_windows_are_the_models_own(
    models: dict[str, Models], prompt: list[int]
) -> None:
    model = models["llama"].ours
    greedy: list[int] = []
    for _ in range(3):
        logprobs = model.continued(model.prefill([*prompt, *greedy], 1), [0])
        greedy.append(int(logprobs[0].argmax()))
    assert Continuation(model, prompt, greedy).is_certain
    wrong = [*greedy[:2], (greedy[2] + 1) % 1024]
    assert not Continuation(model, prompt, wrong).is_certain


def test_a_layer_is_cut_alone(
    models: dict[str, Models], prompt: list[int], target: list[int]
) -> None:
    model, ratios = models["llama"].ours, (0.1, 0.5, 1.0)
    config = PolicyConfig(name="x", **SMALL)
    rule = LengthRule(config, tier_layout(config, NUM_LAYERS))
    window = Continuation(model, prompt, target, [rule])
    costs = window.layer_costs(config, ratios)
    assert costs.shape == (3, NUM_LAYERS, 2)
    assert (costs[0, :, 1] > 1e-5).all()
    assert costs[0, :, 1].sum() > costs[1, :, 1].sum()
    assert np.abs(costs[2]).max() < 1e-6
    # By recency it is known what stays.
    newest = config.model_copy(update={"scorer": "recency"})
    costs = window.layer_costs(newest, (0.3,))
    count = int(0.3 * NUM_PROMPT)
    stay = torch.tensor([[*range(4), *range(NUM_PROMPT - count + 4, NUM_PROMPT)]])
    for layer, cache in enumerate(window.full.layers):
        layers = list(window.full.layers)
        layers[layer] = gathered(cache, stay)
        expected = window.cost(replace(window.full, layers=layers))
        found = pytest.approx([expected.loss, expected.divergence], abs=1e-7)
        assert costs[0, layer].tolist() == found


def test_a_prompt_inside_the_window_cannot_be_cut(
    models: dict[str, Models], prompt: list[int], target: list[int]
) -> None:
    config = PolicyConfig(name="x", **(SMALL | {"recent": 300}))
    rule = LengthRule(config, tier_layout(config, NUM_LAYERS))
    window = Continuation(models["llama"].ours, prompt, target, [rule])
    assert not window.layer_costs(config, (0.1, 0.5)).any()
