"""Other models and set-ups that the policy says it supports."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from pyramid_vllm.kernels import on_torch
from pyramid_vllm.plan import PromptWindow, StepPlan
from pyramid_vllm.spec import TierAttentionSpec
from pyramid_vllm.worker import cache_group
from pyramid_vllm.worker.cache_group import over_heads
from pyramid_vllm.worker.step import TierStep
from tests.engines import (
    close,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
    worker_of,
)
from tests.models import TINY_LLAMA

# With hits that stay whole, tokens would depend on what was hit.
POLICY = {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 2}
POLICY |= {"hit_split": "ignore"}
PROMPTS = random_prompts([300, 40, 517, 129], seed=5)


@pytest.fixture(scope="module")
def mixed_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Gemma 3 in which every third layer has full attention."""
    settings = {
        key: TINY_LLAMA[key] for key in TINY_LLAMA if key != "initializer_range"
    }
    config = Gemma3TextConfig(
        **settings,
        sliding_window=64,
        initializer_range=0.2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma3")
    Gemma3ForCausalLM(config).float().save_pretrained(folder)
    return str(folder)


def test_sliding_window_layers_keep_theirs(mixed_model: str) -> None:
    """Full-attention layers are tiered and others untouched; requests in a batch get
    their tokens as alone."""
    stock = make_llm(mixed_model)
    expected = [g.tokens for g in generate(stock, PROMPTS, 24)]
    close(stock)
    for retention, caching in ((1.0, False), (0.4, False), (1.0, True), (0.4, True)):
        llm = make_llm(
            mixed_model,
            kv_policy="pyramid-by-depth",
            kv_policy_config=POLICY | {"retention": retention},
            enable_prefix_caching=caching,
        )
        scheduler = scheduler_of(llm)
        specs = [g.kv_cache_spec for g in scheduler.kv_cache_config.kv_cache_groups]
        tiers = [spec.tier for spec in specs if isinstance(spec, TierAttentionSpec)]
        assert sorted(tiers) == [0, 1]
        assert len(specs) > 2
        together = [g.tokens for g in generate(llm, PROMPTS, 24)]
        if caching:  # the second time from the cache
            again = [g.tokens for g in generate(llm, PROMPTS, 24)]
            assert again == together
        if retention == 1.0:
            assert together == expected
        else:
            alone = [generate(llm, [prompt], 24)[0].tokens for prompt in PROMPTS]
            assert together == alone
            assert scheduler.kv_counters.num_compactions == 6 + 3 * caching
            scheduler.check_integrity()
        close(llm)


SCRIPT = """
import json, sys
from tests.engines import generate, make_llm, random_prompts

if __name__ == "__main__":
    model, prompts, policy = json.load(sys.stdin)
    llm = make_llm(
        model, tensor_parallel_size=2,
        kv_policy="pyramid-by-depth", kv_policy_config=policy
    )
    print("@", json.dumps([g.tokens for g in generate(llm, prompts, 24)]), flush=True)
"""


@pytest.mark.slow  # tests/test_ray.py shows the same on two nodes
@pytest.mark.timeout(300)
def test_two_ranks_choose_what_one_does(tiny_llama: str, tmp_path: Path) -> None:
    """Each rank has one of the two KV heads and scores with both. Pruned rows have to
    be the same on both ranks, which add theirs up."""
    policy = POLICY | {"recent": 8, "prune_from": 0, "exceed_length_to_compress": 4}
    llm = make_llm(tiny_llama, kv_policy="pyramid-by-depth", kv_policy_config=policy)
    expected = [g.tokens for g in generate(llm, PROMPTS, 24)]
    assert worker_of(llm).tier_state.counters.num_pruned_steps > 0
    assert scheduler_of(llm).kv_counters.num_groups > 0
    close(llm)
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[1])
    result = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([tiny_llama, PROMPTS, policy]),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "PYTHONPATH": root,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("@")]
    assert lines, result.stderr[-3000:]
    assert json.loads(lines[0][1:]) == expected


def test_scores_of_one_head_are_reduced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with a single KV head still needs the other ranks' scores."""
    other = torch.tensor([[0.0, 4.0, 2.0]])
    monkeypatch.setattr(cache_group, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(
        cache_group, "tensor_model_parallel_all_reduce", lambda scores: scores + other
    )
    assert over_heads(torch.tensor([[2.0, 0.0, 2.0]]), True).tolist() == [
        [1.0, 2.0, 2.0]
    ]
    # Scores of no head are the same on every rank.
    assert over_heads(torch.tensor([[2.0, 0.0, 2.0]]), False).tolist() == [
        [2.0, 0.0, 2.0]
    ]


def test_windows_without_metadata_are_an_error() -> None:
    adapter: Any = SimpleNamespace(num_groups=1)
    runner = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=2)
    step = TierStep(32, adapter, runner, {0: 0}, {}, on_torch)
    window = PromptWindow("a", "pyramid", 10, 2, False, (5,), 2)
    step.begin(
        StepPlan(
            num_reqs=1,
            num_prompt_tokens=10,
            windows=(window,),
            generated=(),
            released=frozenset(),
        )
    )
    with pytest.raises(AssertionError, match="before its metadata"):
        _ = step.rows
    with pytest.raises(RuntimeError, match=r"0 of 3 layers compacted \['a'\]"):
        step.finish(3)
