"""Other features of vLLM keep working with the policy.

Every test runs with the policy at work, which its fixture checks, and compares with
the same requests alone, unchunked or undisturbed, or with stock vLLM.
"""

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.core.sched.interface import PauseState

from pyramid_vllm.plan import plan_of
from pyramid_vllm.stats import PROMPT_LOGPROBS
from tests.engines import (
    MIB,
    generate,
    random_prompts,
    run_two_ahead,
    scheduler_of,
)
from tests.one_engine import (
    Numbers,
    OneEngine,
    Tokens,
    activity,
    save_tokenizer,
    watched,
)
from tests.scheduling import free_pages

PLAIN = {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 3}
GROUPED = PLAIN | {"recent": 8, "exceed_length_to_compress": 4}
PRUNED = PLAIN | {"recent": 8, "prune_from": 0}
POLICIES = {"plain": PLAIN, "grouped": GROUPED, "pruned": PRUNED}

# The second is too short to be compacted.
PROMPTS = random_prompts([300, 40, 517, 129], seed=5)
NUM_COMPACTED = 3
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def engines(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("together") / "model"
    shutil.copytree(tiny_llama, folder)
    save_tokenizer(folder, 512)
    one = OneEngine(str(folder))
    outputs = serve(one.get(), PROMPTS, ask(prompt_logprobs=2, max_tokens=1))
    one.stock = [numbers(output.prompt_logprobs[1:]) for output in outputs]
    yield one
    one.close()


@pytest.fixture(scope="module", params=POLICIES)
def name(request: pytest.FixtureRequest) -> str:
    """A policy's name; all tests of one policy run before the next policy's."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def alone(engines: OneEngine, name: str) -> Tokens:
    """Greedy output of every prompt, served alone and in one chunk."""
    if name not in engines.alone:
        llm = engines.get(kv_policy=POLICIES[name])
        engines.alone[name] = [
            generate(llm, [prompt], NUM_TOKENS)[0].tokens for prompt in PROMPTS
        ]
    return engines.alone[name]


@pytest.fixture
def llm(engines: OneEngine, name: str, alone: Tokens) -> Iterator[Any]:
    """An engine with a policy, that prefills every prompt in one chunk."""
    with watched(engines.get(kv_policy=POLICIES[name]), POLICIES[name]) as engine:
        yield engine


def ask(**settings: Any) -> SamplingParams:
    defaults = {
        "temperature": 0.0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    return SamplingParams(**(defaults | settings))


def serve(llm: Any, prompts: Tokens, sampling: Any, **settings: Any) -> list[Any]:
    """Outputs of one batch."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs: list[Any] = llm.generate(inputs, sampling, use_tqdm=False, **settings)
    return outputs


def tokens_of(outputs: list[Any]) -> Tokens:
    return [list(output.outputs[0].token_ids) for output in outputs]


def submit(llm: Any, first: int, prompts: Tokens, sampling: Any = None) -> None:
    """Queue requests, greedy ones if nothing is said, named by numbers."""
    sampling = sampling or ask()
    for index, prompt in enumerate(prompts, first):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)


def finish(llm: Any) -> Tokens:
    """Step until nothing is left; outputs in the order of their names."""
    done: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            done[output.request_id] = list(output.outputs[0].token_ids)
        scheduler_of(llm).check_integrity()
    return [done[key] for key in sorted(done, key=int)]


def steps(llm: Any, count: int) -> None:
    for _ in range(count):
        llm.llm_engine.step()


# What a request asks for.


def test_parallel_samples_are_seeded_requests(llm: Any) -> None:
    """Sample ``i`` of ``n`` is a request of its own with seed ``seed + i``."""
    outputs = serve(llm, PROMPTS, ask(n=3, seed=11, temperature=1.0))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        samples = [list(sample.token_ids) for sample in output.outputs]
        assert len({tuple(sample) for sample in samples}) == 3
        for index, sample in enumerate(samples):
            single = ask(seed=11 + index, temperature=1.0)
            assert tokens_of(serve(llm, [prompt], single)) == [sample]


def test_stop_tokens_end_the_output(llm: Any, alone: Tokens) -> None:
    """The output ends at the first of them after ``min_tokens``; other requests go
    on."""
    index, position = next(
        (index, position)
        for index, tokens in enumerate(alone)
        for position in range(NUM_TOKENS // 2, NUM_TOKENS - 8)
        if tokens[position] not in tokens[:position]
    )
    stop = alone[index][position]
    stopping = {"stop_token_ids": [stop]}
    sampling = [ask() for _ in PROMPTS]
    sampling[index] = ask(min_tokens=position, **stopping)
    outputs = serve(llm, PROMPTS, sampling)
    assert outputs[index].outputs[0].stop_reason == stop
    expected = [list(tokens) for tokens in alone]
    expected[index] = alone[index][: position + 1]
    assert tokens_of(outputs) == expected
    # Until then, the token itself is not chosen.
    sampling[index] = ask(min_tokens=position + 4, **stopping)
    together = tokens_of(serve(llm, PROMPTS, sampling))[index]
    assert together[:position] == alone[index][:position]
    assert stop not in together[: position + 4]
    assert [together] == tokens_of(serve(llm, [PROMPTS[index]], sampling[index]))


def test_stop_strings_end_the_output(llm: Any, alone: Tokens) -> None:
    """The front end finds them after the engine's step; the engine then frees the pages
    of a running request."""
    texts = [output.outputs[0].text for output in serve(llm, PROMPTS, ask())]
    found = [re.search("[a-z]{4}", text[20:]) for text in texts]
    stops = [match.group() for match in found if match is not None]
    assert len(stops) == len(PROMPTS)
    outputs = serve(llm, PROMPTS, [ask(stop=stop) for stop in stops])
    for output, text, stop, tokens in zip(outputs, texts, stops, alone, strict=True):
        (completion,) = output.outputs
        assert completion.text == text[: text.index(stop)]
        assert completion.stop_reason == stop
        count = len(completion.token_ids)
        assert 0 < count < NUM_TOKENS
        assert list(completion.token_ids) == tokens[:count]


def numbers(rows: Any) -> Numbers:
    """Log probabilities by position and token."""
    return [{token: value.logprob for token, value in row.items()} for row in rows]


def assert_near(ours: Numbers, expected: Numbers) -> None:
    assert ours == [pytest.approx(row, abs=1e-4) for row in expected]


def test_logprobs_are_those_alone(llm: Any, alone: Tokens) -> None:
    sampling = ask(logprobs=3)
    outputs = serve(llm, PROMPTS, sampling)
    assert tokens_of(outputs) == alone
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (single,) = serve(llm, [prompt], sampling)
        rows = output.outputs[0].logprobs
        assert len(rows) == NUM_TOKENS
        assert min(len(row) for row in rows) >= 3
        assert_near(numbers(rows), numbers(single.outputs[0].logprobs))


def test_prompt_logprobs_are_those_of_stock(
    engines: OneEngine, llm: Any, name: str, alone: Tokens
) -> None:
    """Every row is computed for them, while rows of other requests are pruned. The
    eviction at the prompt's end follows."""
    counted = scheduler_of(llm).kv_counters.unpruned
    before = counted.get(PROMPT_LOGPROBS, 0)
    asking = (0, 3)
    sampling = [ask(prompt_logprobs=2 if i in asking else None) for i in range(4)]
    outputs = serve(llm, PROMPTS, sampling)
    for index, output in enumerate(outputs):
        if index in asking:
            rows = output.prompt_logprobs[1:]
            assert len(rows) == len(PROMPTS[index]) - 1
            assert_near(numbers(rows), engines.stock[index])
        if name != "pruned" or index not in asking:
            assert tokens_of([output]) == [alone[index]]
    unpruned = counted.get(PROMPT_LOGPROBS, 0) - before
    assert unpruned == (2 if name == "pruned" else 0)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{12,20}$"},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 999},
            "minItems": 2,
            "maxItems": 3,
        },
        "done": {"type": "boolean"},
    },
    "required": ["name", "sizes", "done"],
    "additionalProperties": False,
}


def test_structured_outputs_conform(llm: Any, alone: Tokens) -> None:
    """Grammars' masks are applied to their own rows, so outputs are those of each
    request alone."""
    grammars = [
        StructuredOutputsParams(regex="[a-z]{20,30}@[0-9]{3}"),
        StructuredOutputsParams(choice=["left", "right"]),
        StructuredOutputsParams(json=SCHEMA),
        None,
    ]
    sampling = [
        ask(structured_outputs=grammar, max_tokens=90, ignore_eos=False)
        for grammar in grammars[:3]
    ] + [ask()]
    outputs = serve(llm, PROMPTS, sampling)
    texts = [output.outputs[0].text for output in outputs]
    assert re.fullmatch("[a-z]{20,30}@[0-9]{3}", texts[0])
    assert texts[1] in ("left", "right")
    parsed = json.loads(texts[2])
    assert sorted(parsed) == ["done", "name", "sizes"]
    assert re.fullmatch("[a-z]{12,20}", parsed["name"])
    assert all(0 <= size <= 999 for size in parsed["sizes"])
    together = tokens_of(outputs)
    assert together[3] == alone[3]
    for index in range(3):
        single = serve(llm, [PROMPTS[index]], sampling[index])
        assert tokens_of(single) == [together[index]]


# What an operator asks for.


def test_a_reset_prefix_cache_changes_no_token(llm: Any, alone: Tokens) -> None:
    """All running requests are replayed."""
    assert llm.reset_prefix_cache()
    submit(llm, 0, PROMPTS)
    steps(llm, 20)
    before = scheduler_of(llm).kv_counters.num_compactions
    assert scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
    assert len(scheduler_of(llm).tier_lengths) == 0
    assert finish(llm) == alone
    assert scheduler_of(llm).kv_counters.num_compactions - before >= NUM_COMPACTED


@pytest.mark.parametrize("level", [0, 1])
def test_a_sleep_changes_no_token(llm: Any, alone: Tokens, level: int) -> None:
    """On a CPU, sleep is a pause that keeps requests, and from level 1 on empties the
    KV cache. Nothing runs then; requests that come wait for the end of it."""
    submit(llm, 0, PROMPTS[:2])
    steps(llm, 20)
    llm.sleep(level=level, mode="keep")
    submit(llm, 2, PROMPTS[2:])
    before = activity(llm)
    steps(llm, 3)
    assert activity(llm) == before
    requests = list(scheduler_of(llm).requests.values())
    assert [request.num_output_tokens for request in requests] == [20, 20, 0, 0]
    assert llm.wake_up()
    assert finish(llm) == alone


def test_a_pause_that_aborts_gives_everything_back(llm: Any, alone: Tokens) -> None:
    core = llm.llm_engine.engine_core.engine_core
    pages = free_pages(core.scheduler)
    submit(llm, 0, PROMPTS[:3])
    steps(llm, 20)
    core.pause_scheduler("abort")
    assert free_pages(core.scheduler) == pages
    llm.llm_engine.abort_request(["0", "1", "2"])
    submit(llm, 3, PROMPTS[3:])
    steps(llm, 3)
    assert free_pages(core.scheduler) == pages
    core.resume_scheduler()
    assert finish(llm) == alone[3:]


def test_a_pause_that_waits_ends_running_requests(llm: Any, alone: Tokens) -> None:
    """Nothing can wait in this process, so the test makes the pause's two steps: what
    runs goes on, and what comes later waits."""
    core = llm.llm_engine.engine_core.engine_core
    with pytest.raises(ValueError, match="can't be used in inproc-engine mode"):
        core.pause_scheduler("wait")
    submit(llm, 0, PROMPTS[:3])
    steps(llm, 20)
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    submit(llm, 3, PROMPTS[3:])
    tokens: dict[str, list[int]] = {}
    while len(tokens) < 3:
        for output in llm.llm_engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    assert [tokens[str(index)] for index in range(3)] == alone[:3]
    (waiting,) = core.scheduler.requests.values()
    assert waiting.num_computed_tokens == 0
    core.resume_scheduler()
    assert finish(llm) == alone[3:]


def test_two_plans_ahead_of_the_worker(llm: Any, alone: Tokens) -> None:
    """vLLM turns asynchronous scheduling off here, so the test drives it by hand: it
    plans a compression and prunes a prompt before the tokens in front of them are
    known."""
    assert not llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    submit(llm, 0, PROMPTS)
    assert run_two_ahead(llm) == alone
    llm.llm_engine.abort_request([str(index) for index in range(len(PROMPTS))])


# Other settings of the engine.


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("plain", {"max_num_batched_tokens": 64}),
        ("grouped", {"long_prefill_token_threshold": 50}),
    ],
    indirect=["name"],
)
def test_chunks_beside_decodes_change_no_token(
    engines: OneEngine, name: str, alone: Tokens, setting: dict[str, int]
) -> None:
    """What is kept does not depend on how a prompt is cut, nor on what runs beside
    it, nor on a replay that cuts it again."""
    llm = engines.get(kv_policy=POLICIES[name], **setting)
    scheduler, mixed = scheduler_of(llm), 0
    schedule = scheduler.schedule

    def watch(*args: Any) -> Any:
        nonlocal mixed
        output = schedule(*args)
        num_prompt_tokens = plan_of(output).num_prompt_tokens
        mixed += 0 < num_prompt_tokens < output.total_num_scheduled_tokens
        return output

    with watched(llm, POLICIES[name]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", watch)
        submit(llm, 0, PROMPTS)
        steps(llm, 7)
        scheduler.reset_prefix_cache(reset_running_requests=True)
        tokens = finish(llm)
    assert tokens == alone
    assert mixed > 3


def test_urgent_requests_preempt_others(
    engines: OneEngine, name: str, alone: Tokens
) -> None:
    """The least urgent running request is replayed and gets the same tokens."""
    llm = engines.get(
        kv_policy=POLICIES[name] | {"growth_reserve": 0},
        scheduling_policy="priority",
        kv_cache_memory_bytes=int(1.5 * MIB),
        max_model_len=200,
        max_num_seqs=10,
    )
    scheduler, preempted = scheduler_of(llm), []
    preempt = scheduler._preempt_request

    def watch(request: Any, *args: Any, **kwargs: Any) -> None:
        assert request.priority >= max(r.priority for r in scheduler.running)
        preempted.append(request.num_output_tokens)
        preempt(request, *args, **kwargs)

    prompts, priorities = [PROMPTS[3], PROMPTS[1]] * 5, [3, 8, 0, 6, 9, 2, 5, 7, 1, 4]
    with watched(llm, POLICIES[name]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_preempt_request", watch)
        outputs = serve(llm, prompts, ask(), priority=priorities)
    assert max(preempted, default=0) > 0, "nothing was preempted"
    assert tokens_of(outputs) == [alone[3], alone[1]] * 5


def test_seeded_samples_survive_a_replay(engines: OneEngine) -> None:
    """A preempted request goes on with the random numbers that it had."""
    llm = engines.get(kv_policy=PLAIN)
    sampling = ask(temperature=1.0, seed=3)
    expected = tokens_of(serve(llm, PROMPTS, sampling))
    submit(llm, 0, PROMPTS, sampling)
    steps(llm, 20)
    assert scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
    assert finish(llm) == expected
    assert scheduler_of(llm).kv_counters.num_compactions >= 3 * NUM_COMPACTED


def test_kv_events_tell_of_pages(engines: OneEngine) -> None:
    """Events report cached pages and their end: when others need them, or when the
    cache is reset, which changes no token."""
    llm = engines.get(
        kv_policy=PLAIN,
        enable_prefix_caching=True,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        kv_cache_memory_bytes=2 * MIB,
        max_model_len=512,
    )
    manager, told = scheduler_of(llm).kv_cache_manager, []
    take = manager.take_events

    def watch() -> Any:
        events = take() or []
        told.extend(events)
        return events

    with watched(llm, PLAIN), pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "take_events", watch)
        batches = [random_prompts([300, 200], seed=seed) for seed in range(4)]
        outputs = [generate(llm, prompts, 12) for prompts in batches]
        stored = {h for e in told if isinstance(e, BlockStored) for h in e.block_hashes}
        gone = {h for e in told if isinstance(e, BlockRemoved) for h in e.block_hashes}
        assert gone
        assert gone < stored
        assert llm.reset_prefix_cache()
        assert [g.tokens for g in generate(llm, batches[-1], 12)] == [
            g.tokens for g in outputs[-1]
        ]
    assert any(isinstance(event, AllBlocksCleared) for event in told)
