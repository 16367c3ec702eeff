"""Scorers of other modules are found by name, checked, and refused where nothing runs
them."""

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramid_vllm.policy import (
    SCORERS,
    KVPolicyError,
    PolicyConfig,
    Queries,
    Scorer,
    resolve_policy,
    scorer,
    scorers,
)
from pyramid_vllm.scorers import ScoreInputs, layer_scores

NUM_TOKENS = 9

MODULE = """\
import torch
from pyramid_vllm.policy import Queries, scorer

@scorer(Queries.NONE, is_pooled=True)
def evens(inputs, config):
    tokens, heads, _ = inputs.key.shape
    return (torch.arange(tokens) % 2 == 0).float().expand(heads, -1)

@scorer(Queries.ALL)
def all_queries(inputs, config):
    raise NotImplementedError

plain = len
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module with scorers, that lies outside the package."""
    (tmp_path / "own_scorers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_scorers", raising=False)
    scorers.find_scorer.cache_clear()
    return "own_scorers"


def inputs() -> ScoreInputs:
    return ScoreInputs(None, torch.zeros(NUM_TOKENS, 2, 4), 1.0, 0.0, None, 2)


def policy(name: str, **settings: Any) -> PolicyConfig:
    found = resolve_policy({"base": "uniform", "scorer": name} | settings)
    assert found is not None
    return found


@pytest.mark.parametrize("name", SCORERS)
def test_what_is_built_in_is_there(name: str) -> None:
    config, key = policy(name), torch.randn(NUM_TOKENS, 2, 4)
    reads = config.needs_queries
    scores = layer_scores(
        inputs()._replace(key=key, query=torch.randn(3, 4, 4) if reads else None),
        config,
    )
    assert scores.isfinite().all()


def test_policies_are_read_without_torch() -> None:
    code = (
        "import sys\n"
        "from pyramid_vllm.policy import preset_names, resolve_policy\n"
        "assert all(resolve_policy(n) for n in preset_names() if n != 'none')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_s_scorer_is_called_and_pooled(module: str) -> None:
    evens = [1.0, 0.0] * 4 + [1.0]
    config = policy(f"{module}:evens")
    assert config.scored_queries is Queries.NONE
    assert layer_scores(inputs(), config).tolist() == [evens] * 2
    pooled = config.model_copy(update={"pooling": "max", "pool_kernel": 3})
    # The recent window, two tokens, is left as it is.
    assert layer_scores(inputs(), pooled).tolist() == [[1.0] * 7 + evens[7:]] * 2


def test_an_entry_point_s_scorer_goes_by_its_name(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("evens", f"{module}:evens", scorers.ENTRY_POINTS)
    monkeypatch.setattr(
        scorers, "entry_points", lambda **which: EntryPoints([point]).select(**which)
    )
    assert policy("evens").scoring is scorers.find_scorer(f"{module}:evens")
    with pytest.raises(KVPolicyError, match="attention, evens, key_diff, key_norm"):
        policy("odds")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("{}:odds", {}, ["'scorer' is '{}:odds'", "no attribute 'odds'"]),
        ("no_such_module:evens", {}, ["No module named 'no_such_module'"]),
        ("{}:plain", {}, ["'{}:plain'", "builtin_function", "@scorer"]),
        ("evens", {}, ["'scorer' is 'evens'", "votes, and 'module:name'"]),
        ("{}:all_queries", {"evict": "chunk"}, ["'{}:all_queries'", "'prompt_end'"]),
        ("{}:evens", {"exceed_length_to_compress": 8}, ["'{}:evens'", "none"]),
    ],
)
def test_what_cannot_be_used_is_named(
    module: str, name: str, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(KVPolicyError) as error:
        policy(name.format(module), **settings)
    for word in words:
        assert word.format(module) in str(error.value)


def test_scores_that_add_up_are_not_pooled() -> None:
    with pytest.raises(ValueError, match="never pooled"):
        scorer(Queries.ALL, is_pooled=True)(len)


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(1, NUM_TOKENS), torch.zeros(2, 8), torch.zeros(2, NUM_TOKENS).half()],
)
def test_scores_of_another_shape_stop_the_step(
    scores: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Scorer(lambda inputs, config: scores, Queries.NONE)
    monkeypatch.setitem(SCORERS, "wrong", wrong)
    with pytest.raises(RuntimeError, match=r"'wrong' gave .* valid is torch.float32"):
        layer_scores(inputs(), policy("wrong"))


def test_layers_on_a_device_refuse_what_no_kernel_computes(module: str) -> None:
    from pyramid_vllm.kernels import on_triton

    assert set(SCORERS) == on_triton.SCORERS
    on_triton.check_policies(policy(name) for name in SCORERS)
    with pytest.raises(KVPolicyError, match=rf"scorer='{module}:evens' on this device"):
        on_triton.check_policies([policy(f"{module}:evens")])
