"""Tokens, probabilities, rows and lengths of the engine are the oracle's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyramid_vllm.tools.cli.demo import long_prompts
from tests.conftest import BACKEND
from tests.engines import (
    MIB,
    Generation,
    close,
    generate,
    make_llm,
    random_prompts,
    record_chunks,
    scheduler_of,
    worker_of,
)
from tests.models import save_tiny
from tests.oracle import DenseModel, Oracle

# With a GPU's backend, kernels are interpreted: each step takes long.
NUM_TOKENS = 64 if BACKEND is None else 24
LENGTHS = [1, 2, 5, 17, 33, 64, 100, 129, 200, 333, 512, 700]
if BACKEND is not None:
    LENGTHS = LENGTHS[::3] + LENGTHS[-1:]
CHUNKS = {"64": 64, "128": 128, "whole": 4096}
FAMILIES = {"llama": 6, "qwen2": 5, "qwen3": 8}

#: Every preset, small enough for these prompts to evict, and what none of them has.
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "pyramid": (
        "pyramid",
        {
            "tiers": 3,
            "recent": 24,
            "queries": 40,
            "query_ratio": 0.2,
            "min_context": 40,
        },
    ),
    "pyramid-by-depth": (
        "pyramid-by-depth",
        {"tiers": 3, "recent": 24, "min_context": 40},
    ),
    "pyramid-head-chunk": (
        "pyramid-by-depth",
        {
            "tiers": "layers",
            "recent": 16,
            "min_context": 24,
            "queries": 40,
            "selection": "head",
            "evict": "chunk",
        },
    ),
    "pyramid-pruned": (
        "pyramid-by-depth",
        {
            "tiers": 3,
            "retention": 0.4,
            "recent": 16,
            "min_context": 24,
            "queries": 40,
            "prune_from": 2,
            "exceed_length_to_compress": 8,
            "gen_decay_ratio": 0.5,
            "gen_queries": 6,
            "selection": "head",
        },
    ),
    "segments": ("segments", {"segment": 128, "recent": 32, "tiers": 3}),
    "pyramidinfer-steep": (
        "pyramidinfer",
        {"prefill_decay_ratio": 0.3, "min_context_length": 8, "recent": 4},
    ),
    "pyramidinfer-linear": (
        "pyramidinfer",
        {
            "prefill_decay_strategy": "linear",
            "gen_decay_strategy": "linear",
            "prefill_decay_ratio": 0.5,
            "min_context_length": 8,
        },
    ),
    "uniform": ("uniform", {"recent": 24, "min_context": 40}),
    "streaming": ("streaming", {"recent": 24, "min_context": 40}),
    "streaming-generation": (
        "streaming",
        {"recent": 12, "min_context": 16, "exceed_length_to_compress": 16},
    ),
    "pyramidkv": ("pyramidkv", {"recent": 16}),
    "pyramidkv-capacity": ("pyramidkv", {"recent": 16, "capacity": 60}),
    "snapkv": ("snapkv", {"recent": 16, "pooling": "max", "pool_kernel": 7}),
    "h2o": ("h2o", {}),
    "corm": ("corm", {"recent": 24, "min_context": 40}),
    "tova": ("tova", {}),
    "knorm": ("knorm", {}),
} | {
    name: (name, {})
    for name in (
        "pyramidinfer",
        "pyramidinfer-llama2-7b",
        "pyramidinfer-llama2-13b",
        "pyramidinfer-llama2-70b",
        "pyramidinfer-llama3-8b",
        "pyramidinfer-llama3-70b",
    )
}


#: Presets that differ from another one in their name alone.
SAME = {
    "pyramidinfer-llama2-7b": "pyramidinfer",
    "pyramidinfer-llama3-8b": "pyramidinfer",
    "pyramidinfer-llama3-70b": "pyramidinfer-llama2-70b",
}


#: Those that meet every kernel; with a GPU's backend the others take minutes.
WITH_KERNELS = {
    "pyramid",
    "pyramid-head-chunk",
    "pyramid-pruned",
    "pyramidinfer-steep",
    "streaming-generation",
    "snapkv",
    "h2o",
    "corm",
    "knorm",
}


def cases() -> Iterator[Any]:
    """Every policy, family and cut of prompts; by default only some of them."""
    cuts = list(CHUNKS)
    for number, policy in enumerate(name for name in POLICIES if name not in SAME):
        # In turns, so that every family meets every cut.
        first, second = cuts[number % 3], cuts[(number + 1) % 3]
        other = ("qwen2", "qwen3")[number % 2]
        quick = {"llama": [first, second], other: [second]}
        if BACKEND is not None:
            family = ("llama", "qwen2", "qwen3")[number % 3]
            quick = {family: [first]} if policy in WITH_KERNELS else {}
        for family in FAMILIES:
            for chunks, marks in (
                (quick.get(family, []), []),
                (
                    [c for c in cuts if c not in quick.get(family, [])],
                    [pytest.mark.slow],
                ),
            ):
                if chunks:
                    name = "-".join((family, policy, *chunks))
                    yield pytest.param(family, policy, chunks, id=name, marks=marks)


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[str, DenseModel]]:
    saved = {}
    for family, num_layers in FAMILIES.items():
        path = save_tiny(tmp_path_factory.mktemp(family), family, num_layers)
        saved[family] = path, DenseModel(path)
    return saved


@pytest.mark.parametrize(("family", "policy", "chunks"), cases())
def test_engine_equals_oracle(
    models: dict[str, tuple[str, DenseModel]],
    family: str,
    policy: str,
    chunks: list[str],
) -> None:
    """Prompts cut into chunks, in one batch with others that already generate."""
    path, dense = models[family]
    name, settings = POLICIES[policy]
    llm = make_llm(
        path, kv_policy=name, kv_policy_config=settings, max_num_batched_tokens=4096
    )
    try:
        oracle = Oracle(dense, worker_of(llm).kv_policy)
        for chunk in chunks:
            compare(llm, oracle, CHUNKS[chunk])
    finally:
        close(llm)


def compare(llm: Any, oracle: Oracle, chunk: int) -> None:
    """Run one batch through the engine and the oracle."""
    scheduler, counters = scheduler_of(llm), worker_of(llm).tier_state.counters
    scheduler.max_num_scheduled_tokens = chunk
    rows_before = counters.num_computed.copy()
    scheduled_before = counters.num_scheduled
    evicted_before = scheduler.kv_counters.num_evicted_tokens
    # Of different tokens: equal ones have keys of the same length in the first layer.
    rng = np.random.default_rng(chunk)
    prompts = [rng.permutation(1024)[:length].tolist() for length in LENGTHS]
    with record_chunks(scheduler) as steps:
        ours = generate(llm, prompts, NUM_TOKENS)
    num_decided, rows = 0, np.zeros_like(rows_before)
    for prompt, sizes, generation in zip(prompts, steps, ours, strict=True):
        sizes = sizes[: _num_chunks(sizes, len(prompt))]
        assert max(sizes) <= chunk
        expected = oracle.run(prompt, sizes, generation.tokens)
        rows += expected.rows
        if expected.decided:
            num_decided += 1
            assert_same(generation, expected.logprobs, len(prompt))
    assert num_decided >= len(prompts) * 2 // 3, "too many requests hang on rounding"
    computed = counters.num_computed - rows_before
    assert computed.tolist() == rows.tolist(), "rows computed per layer"
    assert counters.num_scheduled - scheduled_before == sum(LENGTHS)
    assert scheduler.kv_counters.num_evicted_tokens > evicted_before
    if oracle.config.prune_from is None:
        assert set(rows) == {sum(LENGTHS)}
    elif chunk > max(LENGTHS):
        assert rows[-1] < sum(LENGTHS), "nothing was pruned"
    scheduler.check_integrity()


def _num_chunks(steps: list[int], prompt: int) -> int:
    """Steps of a request that computed its prompt."""
    done = 0
    for count, step in enumerate(steps):
        if done == prompt:
            return count
        done += step
    return len(steps)


def assert_same(ours: Generation, theirs: list[Any], prompt: int) -> None:
    """Each token is the oracle's greedy token and has the same probability."""
    assert len(ours.tokens) == len(theirs) == NUM_TOKENS
    for step, (token, logprob, row) in enumerate(
        zip(ours.tokens, ours.logprobs, theirs, strict=True)
    ):
        where = f"prompt of {prompt} tokens, output token {step}"
        assert logprob == pytest.approx(float(row[token]), abs=1e-3), where
        # The two programs' rounding may decide which of two tokens is the best.
        assert float(row.max() - row[token]) < 1e-3, where


def test_policies_cover_every_preset() -> None:
    from pyramid_vllm.policy import NONE, preset_names, resolve_policy

    assert {name for name, _ in POLICIES.values()} == {*preset_names()} - {NONE}
    for name, twin in SAME.items():
        a, b = resolve_policy(name), resolve_policy(twin)
        assert a is not None
        assert b is not None
        assert a.model_dump(exclude={"name"}) == b.model_dump(exclude={"name"})


def test_the_oracle_sees_a_difference(tmp_path: Path) -> None:
    """The comparison above can fail: probabilities of another policy differ."""
    dense = DenseModel(save_tiny(tmp_path, "llama", 6))
    from pyramid_vllm.policy import resolve_policy

    (prompt,) = random_prompts([300])
    output = list(range(16))
    settings = {"tiers": 3, "recent": 16, "min_context": 24}
    a, b = (
        Oracle(dense, resolve_policy("pyramid-by-depth", settings | change)).run(
            prompt, [300], output
        )
        for change in ({}, {"distance_weight": 3.0})
    )
    differences = [
        float((x - y).abs().max()) for x, y in zip(a.logprobs, b.logprobs, strict=True)
    ]
    assert differences[0] == 0, "the first token is sampled before anything is evicted"
    assert max(differences) > 1e-2


REAL_POLICIES = [
    pytest.param(
        name,
        marks=[] if name in ("pyramid", "pyramidinfer") else pytest.mark.slow,
    )
    for name in POLICIES
    if name not in SAME
]


@pytest.fixture(scope="module")
def real(real_model: str) -> tuple[str, DenseModel, list[list[int]]]:
    """SmolLM2, its oracle, and four real prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    pages = long_prompts(tokenizer, 4, 420)
    prompts = [page[: 110 * (i + 1) - 20] for i, page in enumerate(pages)]
    return real_model, DenseModel(real_model), prompts


@pytest.mark.real_model
@pytest.mark.timeout(900)
@pytest.mark.parametrize("policy", REAL_POLICIES)
def test_a_real_model_equals_the_oracle(
    real: tuple[str, DenseModel, list[list[int]]], policy: str
) -> None:
    path, dense, prompts = real
    name, settings = POLICIES[policy]
    llm = make_llm(
        path,
        kv_policy=name,
        kv_policy_config=settings,
        kv_cache_memory_bytes=256 * MIB,
        max_num_seqs=4,
    )
    with record_chunks(scheduler_of(llm)) as steps:
        ours = generate(llm, prompts, NUM_TOKENS)
    oracle = Oracle(dense, worker_of(llm).kv_policy)
    close(llm)
    num_decided = 0
    for prompt, sizes, generation in zip(prompts, steps, ours, strict=True):
        sizes = sizes[: _num_chunks(sizes, len(prompt))]
        expected = oracle.run(prompt, sizes, generation.tokens)
        num_decided += expected.decided
        if expected.decided:
            assert_same(generation, expected.logprobs, len(prompt))
    # Repeated words have keys of the same length in the first layer: rounding decides.
    assert num_decided >= (1 if policy == "knorm" else 2)
