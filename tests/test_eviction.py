"""What a tier holds after a prompt, read back from the cache of a running engine."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pyramid_vllm.plan import PLAN_ATTRIBUTE
from pyramid_vllm.policy import LengthRule
from tests.engines import (
    MIB,
    close,
    drain,
    generate,
    held_kv,
    make_llm,
    random_prompts,
    run_two_ahead,
    scheduler_of,
    start,
    worker_of,
)

NUM_LAYERS = 6
PROMPTS = random_prompts([300, 40, 517, 129, 700, 64, 250], seed=3)
POLICY = {
    "retention": 0.4,
    "recent": 24,
    "min_context": 40,
    "tiers": 3,
    "steepness": 0.8,
}

Engine = Callable[..., Any]


@pytest.fixture
def engine(tiny_llama: str) -> Iterator[Engine]:
    """Makes engines with a policy; closes them after the test."""
    made = []

    def make(
        policy: str = "pyramid-by-depth", config: Any = None, **settings: Any
    ) -> Any:
        llm = make_llm(
            tiny_llama, kv_policy=policy, kv_policy_config=config or POLICY, **settings
        )
        made.append(llm)
        return llm

    yield make
    for llm in made:
        close(llm)


@pytest.fixture(scope="module")
def full_cache(tiny_llama: str) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Keys and values of every prompt token, by prompt and layer, from stock vLLM."""
    llm = make_llm(tiny_llama, max_num_batched_tokens=4096)
    req_ids = start(llm, PROMPTS, 8)
    cache = [
        [
            tuple(part[: len(prompt)] for part in held_kv(llm, req_id, layer))
            for layer in range(NUM_LAYERS)
        ]
        for req_id, prompt in zip(req_ids, PROMPTS, strict=True)
    ]
    drain(llm)
    close(llm)
    return cache  # type: ignore[return-value]


@pytest.fixture(scope="module")
def attention(tiny_llama: str) -> list[torch.Tensor]:
    """Attention ``[layers, heads, n, n]`` of every prompt, from transformers."""
    model = LlamaForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return [
            torch.cat(model(torch.tensor([p]), output_attentions=True).attentions)
            for p in PROMPTS
        ]


def positions_held(
    llm: Any, req_id: str, layer: int, full: tuple[torch.Tensor, torch.Tensor]
) -> list[list[int]]:
    """Prompt positions that each KV head of a layer holds; K and V must agree."""
    count = num_kept(llm, layer, len(full[0]))
    key, value = (part[:count] for part in held_kv(llm, req_id, layer))
    heads = []
    for head in range(key.shape[1]):
        # The rotation makes keys of equal tokens differ; their values may be equal.
        nearest = torch.cdist(key[:, head].double(), full[0][:, head].double()).min(
            dim=1
        )
        assert nearest.values.max() < 1e-4
        expected = full[1][nearest.indices, head]
        torch.testing.assert_close(value[:, head], expected, rtol=1e-4, atol=1e-4)
        heads.append(nearest.indices.tolist())
    return heads


def num_kept(llm: Any, layer: int, num_prompt_tokens: int) -> int:
    """Prompt tokens that a layer keeps, by the rule; generated tokens follow them."""
    rule: LengthRule = scheduler_of(llm).kv_rule
    return rule.cache_lengths(num_prompt_tokens)[rule.layout.tier_of_layer[layer]]


def expected_positions(
    matrix: torch.Tensor, count: int, rule: LengthRule, per_head: bool
) -> list[tuple[set[int], dict[int, float], float]]:
    """By KV head: the positions to keep, all scores, and the lowest kept score."""
    heads, length, _ = matrix.shape
    recent, sinks = rule.num_recent(length), rule.config.sinks
    weights = torch.linspace(1, rule.config.distance_weight, recent)
    rows = matrix[:, length - recent :] * (weights / weights.sum())[None, :, None]
    scores = rows.sum(1).view(2, heads // 2, length).mean(1)
    if not per_head:
        scores = scores.mean(0, keepdim=True).expand(2, -1)
    result = []
    for row in scores.tolist():
        middle = sorted(range(sinks, length - recent), key=lambda i: (-row[i], -i))
        chosen = middle[: count - sinks - recent]
        always = {*range(sinks), *range(length - recent, length)}
        lowest = row[chosen[-1]] if chosen else 0.0
        result.append((always | set(chosen), dict(enumerate(row)), lowest))
    return result


def assert_selected(
    llm: Any,
    req_ids: list[str],
    full_cache: list[list[tuple[torch.Tensor, torch.Tensor]]],
    attention: list[torch.Tensor],
) -> None:
    """Every layer of every request holds the reference's tokens, in order."""
    rule: LengthRule = scheduler_of(llm).kv_rule
    for req_id, prompt, full, matrices in zip(
        req_ids, PROMPTS, full_cache, attention, strict=True
    ):
        for layer in range(NUM_LAYERS):
            count = num_kept(llm, layer, len(prompt))
            heads = positions_held(llm, req_id, layer, full[layer])
            expected = expected_positions(
                matrices[layer], count, rule, rule.config.selection == "head"
            )
            for held, (positions, scores, lowest) in zip(heads, expected, strict=True):
                assert held == sorted(set(held))
                assert len(held) == count
                # Two programs add in different orders: equal but for true near-ties.
                for position in positions ^ set(held):
                    assert abs(scores[position] - lowest) < 1e-7


@pytest.mark.parametrize("selection", ["layer", "head"])
@pytest.mark.parametrize("tiers", [1, 3, "layers"])
@pytest.mark.parametrize("chunk", [64, 100, 4096])
def test_the_cache_holds_what_the_reference_selects(
    engine: Engine,
    full_cache: list[list[tuple[torch.Tensor, torch.Tensor]]],
    attention: list[torch.Tensor],
    selection: str,
    tiers: int | str,
    chunk: int,
) -> None:
    """This holds however prompts are cut into chunks, and in one batch with others."""
    config = POLICY | {"selection": selection, "tiers": tiers}
    llm = engine(config=config, max_num_batched_tokens=chunk)
    req_ids = start(llm, PROMPTS, 64)
    assert_selected(llm, req_ids, full_cache, attention)
    assert len(worker_of(llm).tier_state.queries) == 0, "queries outlive their prompts"
    drain(llm)
    assert scheduler_of(llm).kv_counters.num_compactions == len(PROMPTS) - 1


def test_kept_keys_and_values_are_exact(
    engine: Engine, full_cache: list[list[tuple[torch.Tensor, torch.Tensor]]]
) -> None:
    llm = engine(max_num_batched_tokens=4096)
    req_ids = start(llm, PROMPTS, 8)
    for req_id, full in zip(req_ids, full_cache, strict=True):
        for layer in range(NUM_LAYERS):
            positions = positions_held(llm, req_id, layer, full[layer])
            for part, whole in zip(
                held_kv(llm, req_id, layer), full[layer], strict=True
            ):
                for head, row in enumerate(positions):
                    assert torch.equal(part[: len(row), head], whole[row, head])
    drain(llm)


def test_streaming_holds_sinks_and_the_newest(
    engine: Engine, full_cache: list[list[tuple[torch.Tensor, torch.Tensor]]]
) -> None:
    llm = engine(
        "streaming", {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 2}
    )
    req_ids = start(llm, PROMPTS, 8)
    rule = scheduler_of(llm).kv_rule
    for req_id, prompt, full in zip(req_ids, PROMPTS, full_cache, strict=True):
        (count, _) = rule.cache_lengths(len(prompt))
        newest = range(len(prompt) - count + 4, len(prompt)) if count > 4 else range(0)
        expected = sorted({*range(min(4, count)), *newest})
        for layer in range(NUM_LAYERS):
            for row in positions_held(llm, req_id, layer, full[layer]):
                assert row == expected
    drain(llm)


def masked_greedy(
    model: Any, prompt: list[int], kept: list[int], count: int
) -> list[int]:
    """Greedy tokens where generated ones see only the kept prompt tokens."""
    length, tokens = len(prompt), list(prompt)
    for _ in range(count):
        total = len(tokens)
        allowed = torch.ones(total, total, dtype=torch.bool).tril()
        # The first token is sampled before anything is evicted.
        allowed[length:, :length] = False
        allowed[length:, kept] = True
        mask = torch.zeros(1, 1, total, total).masked_fill(~allowed, float("-inf"))
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), attention_mask=mask).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[length:]


def test_generation_sees_exactly_the_kept_tokens(
    engine: Engine, tiny_llama: str
) -> None:
    """Lengths, slots and rows after an eviction are compared with transformers, which
    gets a mask."""
    llm = engine(
        "streaming", {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 1}
    )
    ours = generate(llm, PROMPTS, 40)
    model = LlamaForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.float32, attn_implementation="eager"
    )
    rule = scheduler_of(llm).kv_rule
    for prompt, generation in zip(PROMPTS, ours, strict=True):
        (count,) = rule.cache_lengths(len(prompt))
        newest = range(len(prompt) - count + 4, len(prompt))
        kept = sorted({*range(4), *newest})
        assert len(kept) == count
        assert generation.tokens == masked_greedy(model, prompt, kept, 40)


@pytest.mark.parametrize("evict", ["prompt_end", "chunk"])
@pytest.mark.parametrize("selection", ["layer", "head"])
def test_a_batch_is_its_requests_alone(
    engine: Engine, evict: str, selection: str
) -> None:
    """Rows, slots and pages of one request never reach another. Nothing is preempted
    here, and the chunks of a prompt are the same in both runs."""
    config = POLICY | {"evict": evict, "selection": selection}
    llm = engine(config=config, max_num_batched_tokens=4096)
    together = generate(llm, PROMPTS, 48)
    alone = [generate(llm, [prompt], 48)[0] for prompt in PROMPTS]
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert scheduler_of(llm).kv_counters.num_compactions == 2 * (len(PROMPTS) - 1)
    scheduler_of(llm).check_integrity()


def test_preempted_requests_are_as_alone(engine: Engine, tiny_llama: str) -> None:
    """A replay evicts the prompt by its own queries, then adds the outputs after it."""
    llm = engine(kv_cache_memory_bytes=int(3.3 * MIB), max_model_len=960)
    scheduler, preempted = scheduler_of(llm), []
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.num_output_tokens)
        original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    together = generate(llm, PROMPTS, 160)
    assert len(preempted) > 0, "the pool was large enough: nothing was tested"
    assert max(preempted) > 0
    preempted.clear()
    alone = [generate(llm, [prompt], 160)[0] for prompt in PROMPTS]
    assert not preempted
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    scheduler.check_integrity()


def test_chunk_eviction_keeps_the_peak_low(engine: Engine) -> None:
    """A prompt that the pool cannot hold whole runs, where stock refuses to start."""
    settings = {
        "max_model_len": 1000,
        "max_num_batched_tokens": 128,
        "kv_cache_memory_bytes": int(2.5 * MIB),
    }
    with pytest.raises(ValueError, match="KV cache is needed"):
        engine(config={"retention": 1.0}, **settings)
    with pytest.raises(ValueError, match="KV cache is needed"):
        engine(config=POLICY, **settings)
    llm = engine(config=POLICY | {"evict": "chunk"}, **settings)
    (generation,) = generate(llm, random_prompts([980]), 20)
    assert len(generation.tokens) == 20
    assert scheduler_of(llm).kv_counters.num_compactions == -(-980 // 128)


def test_two_plans_ahead_of_the_worker(engine: Engine) -> None:
    """The worker runs plans in order; none needs an earlier step's output."""
    llm = engine(max_num_batched_tokens=256)
    expected = [g.tokens for g in generate(llm, PROMPTS[:4], 24)]
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    for index, prompt in enumerate(PROMPTS[:4]):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    assert run_two_ahead(llm) == expected


def test_a_layer_that_does_not_compact_stops_the_engine(engine: Engine) -> None:
    llm = engine()
    worker = worker_of(llm)
    name = "model.layers.3.self_attn.attn"
    layer = worker.compilation_config.static_forward_context[name]
    layer.impl.tier_layer = None
    with pytest.raises(RuntimeError, match="5 of 6 layers"):
        generate(llm, PROMPTS[:1], 4)


def test_a_step_without_a_plan_stops_the_worker(engine: Engine) -> None:
    llm = engine()
    core = llm.llm_engine.engine_core.engine_core
    start(llm, PROMPTS[:1], 4)
    output = core.scheduler.schedule()
    setattr(output, PLAN_ATTRIBUTE, None)
    getattr(output, "plugin_metadata", {}).clear()
    with pytest.raises(RuntimeError, match="without a plan"):
        core.model_executor.execute_model(output)
