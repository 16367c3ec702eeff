"""Policies that single requests ask for, in a batch with others."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from pyramid_vllm.policy import KVPolicyError
from tests.engines import (
    MIB,
    Generation,
    close,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
    worker_of,
)

POLICY = {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 3}
PROMPTS = random_prompts([300, 40, 517, 129, 700, 250], seed=3)
WISHES: list[dict[str, Any] | None] = [
    None,
    {"kv_policy": "none"},
    {"kv_retention": 0.8},
    {"kv_policy": "streaming", "kv_retention": 0.3},
    {"kv_policy": "h2o"},
    {"kv_policy": "snapkv"},
]


Engine = Callable[..., Any]


@pytest.fixture
def engine(tiny_llama: str) -> Iterator[Engine]:
    """Makes engines, one at a time; closes the last one after the test."""
    made: list[Any] = []

    def make(policy: str | None = "pyramid", config: Any = POLICY, **other: Any) -> Any:
        while made:
            close(made.pop())
        if policy is not None:
            other |= {"kv_policy": policy, "kv_policy_config": config}
        made.append(make_llm(tiny_llama, **other))
        return made[-1]

    yield make
    while made:
        close(made.pop())


def ask(llm: Any, prompts: list[list[int]], wishes: list[Any]) -> list[list[int]]:
    """Greedy outputs, each request with its own ``extra_args``."""
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=24,
            ignore_eos=True,
            detokenize=False,
            extra_args=wish,
        )
        for wish in wishes
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def tokens(generations: list[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


def test_requests_of_several_policies_are_as_alone(engine: Engine) -> None:
    """Every prompt runs under every wish, all in one batch, and alone."""
    llm = engine(config=POLICY | {"hit_split": "ignore"}, enable_prefix_caching=True)
    prompts = [prompt for prompt in PROMPTS for _ in WISHES]
    together = ask(llm, prompts, WISHES * len(PROMPTS))
    counters = scheduler_of(llm).kv_counters
    assert counters.num_compactions > 20
    assert counters.max_num_running > len(PROMPTS)
    for prompt, wish, expected in zip(
        prompts, WISHES * len(PROMPTS), together, strict=True
    ):
        assert ask(llm, [prompt], [wish]) == [expected]


@pytest.mark.parametrize(
    ("wish", "policy", "config"),
    [
        ({"kv_retention": 0.8}, "pyramid", POLICY | {"retention": 0.8}),
        ({"kv_policy": "snapkv"}, "snapkv", None),
        ({"kv_policy": "h2o"}, "h2o", None),
        (
            {"kv_policy": "streaming", "kv_retention": 0.3},
            "streaming",
            {"retention": 0.3},
        ),
    ],
)
def test_a_wish_is_the_engine_of_that_policy(
    engine: Engine, wish: Any, policy: str, config: Any
) -> None:
    """The wish gives the tokens of an engine that has the policy for all its
    requests."""
    other = engine(policy, config)
    expected = tokens(generate(other, PROMPTS, 24))
    assert scheduler_of(other).kv_counters.num_compactions > 0
    assert ask(engine(), PROMPTS, [wish] * len(PROMPTS)) == expected


def test_none_is_stock_vllm(engine: Engine) -> None:
    expected = tokens(generate(engine(None), PROMPTS, 24))
    llm = engine()
    wishes = [{"kv_policy": "none"}] * len(PROMPTS)
    assert ask(llm, PROMPTS, wishes) == expected
    assert scheduler_of(llm).kv_counters.num_compactions == 0
    assert ask(llm, PROMPTS, [None] * len(PROMPTS)) != expected, "the policy is off"


def test_one_server_prunes_and_compresses_some(engine: Engine) -> None:
    """One request drops rows that another one keeps, in the same batch."""
    config = POLICY | {"prune_from": 0, "recent": 8, "exceed_length_to_compress": 4}
    # One chunk a prompt: what is pruned depends on the cut.
    llm = engine(config=config, max_num_batched_tokens=16384)
    wishes = [None, {"kv_policy": "none"}, {"kv_retention": 0.8}, {"kv_policy": "tova"}]
    prompts = [prompt for prompt in PROMPTS for _ in wishes]
    together = ask(llm, prompts, wishes * len(PROMPTS))
    assert worker_of(llm).tier_state.counters.num_pruned_steps > 0
    assert scheduler_of(llm).kv_counters.num_groups > 0
    for prompt, wish, expected in zip(
        prompts, wishes * len(PROMPTS), together, strict=True
    ):
        assert ask(llm, [prompt], [wish]) == [expected]


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"kv_policy": "pyramyd"}, ["'pyramyd'", "none, pyramid, snapkv"]),
    ({"kv_policy": "pyramidinfer"}, ["'pyramidinfer'", "valid on this server"]),
    ({"kv_policy": 3}, ["kv_policy is 3"]),
    ({"kv_retention": 1.5}, ["kv_retention is 1.5", "at most 1"]),
    ({"kv_retention": "half"}, ["kv_retention is 'half'", "above 0"]),
    ({"kv_policy": "none", "kv_retention": 0.5}, ["'none' keeps all"]),
]


def test_an_impossible_wish_is_refused_and_harms_no_other(engine: Engine) -> None:
    llm = engine()
    for wish, words in REFUSED:
        with pytest.raises(KVPolicyError) as error:
            ask(llm, PROMPTS[:1], [wish])
        for word in words:
            assert word in str(error.value)
    assert ask(llm, PROMPTS[:1], [None])
    scheduler_of(llm).check_integrity()


def test_an_engine_without_a_policy_says_so(engine: Engine) -> None:
    stock = engine(None)
    with pytest.raises(KVPolicyError, match="runs without a KV policy, valid is 'none"):
        ask(stock, PROMPTS[:1], [{"kv_policy": "pyramid-by-depth"}])
    assert ask(stock, PROMPTS[:1], [{"kv_policy": "none"}])


def test_a_prompt_that_never_fits_is_refused_at_once(engine: Engine) -> None:
    """It fits under the engine's own policy; under the wish it would need more than all
    pages."""
    llm = engine(
        config=POLICY | {"evict": "chunk"},
        kv_cache_memory_bytes=int(2.5 * MIB),
        max_num_batched_tokens=128,
    )
    prompt = random_prompts([980])
    assert len(ask(llm, prompt, [None])[0]) == 24
    with pytest.raises(KVPolicyError, match="'none': a prompt of 980 tokens"):
        ask(llm, prompt, [{"kv_policy": "none"}])
