"""Many requests over a pool for a few: each gets the tokens that it gets alone."""

import logging
import random
from typing import Any

import pytest
from vllm import SamplingParams

from tests.conftest import BACKEND
from tests.engines import MIB, close, generate, make_llm, random_prompts, scheduler_of

logger = logging.getLogger(__name__)

# With a GPU's backend, kernels are interpreted: each step takes long.
NUM_REQUESTS, MAX_TOKENS = (44, 140) if BACKEND is None else (14, 80)
SLOWER = pytest.mark.slow if BACKEND is not None else ()
POLICY: dict[str, Any] = {
    "retention": 0.4,
    "recent": 24,
    "min_context": 40,
    "tiers": 3,
    # As stock vLLM admits, so that there is something to preempt.
    "growth_reserve": 0,
}
COMMON = random_prompts([240], seed=2)[0]


def make_requests(seed: int) -> list[tuple[list[int], int]]:
    """Prompts, most with a common beginning, and their numbers of output tokens."""
    rng = random.Random(seed)
    lengths = [rng.randint(20, 160) for _ in range(NUM_REQUESTS)]
    return [
        (
            COMMON[: rng.choice([0, 64, 240])] + own,
            rng.randint(40, 140 if BACKEND is None else 80),
        )
        for own in random_prompts(lengths, seed=seed)
    ]


def run_together(
    llm: Any, requests: list[tuple[list[int], int]], seed: int
) -> tuple[dict[int, list[int]], int]:
    """Tokens of the requests that were not aborted, and how many were preempted."""
    rng, engine, scheduler = random.Random(seed), llm.llm_engine, scheduler_of(llm)
    preempted: set[str] = set()
    preempt = scheduler._preempt_request

    def watch(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.add(request.request_id)
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = watch
    for index, (prompt, num_tokens) in enumerate(requests):
        sampling = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    aborted: set[str] = set()
    finished: dict[int, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished and output.outputs[0].finish_reason == "length":
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
        if rng.random() < (0.04 if BACKEND is None else 0.06):
            victim = str(rng.randrange(NUM_REQUESTS))
            if int(victim) not in finished:
                engine.abort_request([victim])
                aborted.add(victim)
    scheduler._preempt_request = preempt
    assert len(finished) + len(aborted) == NUM_REQUESTS
    assert aborted, "nothing was aborted"
    return finished, len(preempted)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        # With hits that stay whole, tokens would depend on what was hit.
        ({"hit_split": "ignore"}, {"enable_prefix_caching": True}),
        pytest.param(
            {"selection": "head"}, {"scheduling_policy": "priority"}, marks=SLOWER
        ),
        pytest.param(
            {"recent": 8, "exceed_length_to_compress": 8},
            {"kv_cache_mib": 2.2},
            marks=SLOWER,
        ),
        pytest.param(
            {"recent": 8, "prune_from": 0, "exceed_length_to_compress": 8},
            {"kv_cache_mib": 2.5 if BACKEND is None else 2.2},
            marks=SLOWER,
        ),
    ],
    ids=["shared", "heads", "groups", "pruned groups"],
)
def test_every_request_is_as_alone(
    tiny_llama: str, change: dict[str, Any], settings: dict[str, Any]
) -> None:
    """This holds for preempted requests too. Where generated tokens are compressed, a
    replay compresses the same ones by the same queries. Where prompts are pruned, a
    replay cuts the prompt as at first, if a step has room for the same chunk."""
    settings = dict(settings)
    # Six requests of the mean length, and what queries of generated tokens take.
    memory = int(settings.pop("kv_cache_mib", 2.2) * MIB)
    llm = make_llm(
        tiny_llama,
        kv_policy="pyramid-by-depth",
        kv_policy_config=POLICY | change,
        kv_cache_memory_bytes=memory,
        max_model_len=512,
        max_num_seqs=8,
        **settings,
    )
    requests = make_requests(seed=5)
    finished, num_preempted = run_together(llm, requests, seed=7)
    counters = scheduler_of(llm).kv_counters
    logger.warning(
        "%d of %d requests preempted, %d at once, %d finished",
        num_preempted,
        NUM_REQUESTS,
        counters.max_num_running,
        len(finished),
    )
    assert num_preempted >= NUM_REQUESTS // 12, (
        "a run without preemptions proves nothing"
    )
    assert counters.num_compactions > len(finished) // 2
    scheduler_of(llm).check_integrity()
    # Interpreted, a request alone takes seconds.
    for index, tokens in list(finished.items())[:: 1 if BACKEND is None else 3]:
        prompt, num_tokens = requests[index]
        assert generate(llm, [prompt], num_tokens)[0].tokens == tokens, index
    close(llm)
