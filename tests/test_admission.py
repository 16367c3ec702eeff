"""Which requests are admitted while others run."""

import random
from typing import Any, NamedTuple

import pytest
from vllm.v1.request import RequestStatus

from pyramid_vllm.tools.simulate.engine import sampled
from tests.scheduling import make_request, make_scheduler, make_stock_scheduler

#: A page of our pool has a third of the layers.
NUM_TIERS = 3
POLICY: dict[str, Any] = {"base": "pyramid-by-depth", "tiers": NUM_TIERS}
SETTINGS: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
}


class Load(NamedTuple):
    """Requests, all there from the start: lengths of prompt, limit and true output."""

    requests: list[tuple[int, int, int]]

    @property
    def mean_pages(self) -> float:
        """Stock vLLM's pages of a request."""
        total = sum(prompt + output for prompt, _, output in self.requests)
        return total / len(self.requests) / 32 + 1


class Result(NamedTuple):
    num_preemptions: int
    num_steps: int
    max_num_running: int


def run(scheduler: Any, load: Load) -> Result:
    """Run all requests to their ends, which no scheduler knows in advance."""
    requests, ends = [], {}
    for index, (prompt, limit, output) in enumerate(load.requests):
        requests.append(make_request(str(index), prompt, limit))
        ends[str(index)] = output
        scheduler.add_request(requests[-1])
    num_steps = max_num_running = 0
    while scheduler.has_unfinished_requests():
        step = scheduler.schedule()
        num_steps += 1
        max_num_running = max(max_num_running, len(scheduler.running))
        scheduler.update_from_output(step, sampled(scheduler, step))
        done = [r for r in ends if r in scheduler.requests and over(scheduler, r, ends)]
        scheduler.finish_requests(done, RequestStatus.FINISHED_STOPPED)
    num_preemptions = sum(request.num_preemptions for request in requests)
    return Result(num_preemptions, num_steps, max_num_running)


def over(scheduler: Any, req_id: str, ends: dict[str, int]) -> bool:
    return bool(scheduler.requests[req_id].num_output_tokens >= ends[req_id])


def chat(rng: random.Random, low: int, high: int, mean: float) -> tuple[int, int, int]:
    """A request as chat servers see it: it gives no limit, and outputs differ
    widely."""
    prompt = rng.randint(low, high)
    rest = 2048 - prompt
    return prompt, rest, min(rest, max(5, int(rng.lognormvariate(mean, 0.8))))


def loads() -> dict[str, Load]:
    rng = random.Random(1)
    return {
        "prompts": Load([(768, 128, 128)] * 40),
        "balanced": Load([(512, 512, 512)] * 50),
        "outputs": Load([(200, 1000, 1000)] * 20),
        "chat": Load([chat(rng, 100, 900, 5) for _ in range(40)]),
        "short chat": Load([chat(rng, 30, 200, 5.5) for _ in range(40)]),
    }


@pytest.mark.parametrize("sequences", [4, 12])
@pytest.mark.parametrize("name", loads())
def test_no_more_preemptions_than_stock(
    tiny_llama: str, name: str, sequences: int
) -> None:
    """The default reserve preempts no more than stock does in the same memory and on
    the same load. It takes fewer steps where prompts are long enough to be evicted."""
    load = loads()[name]
    num_blocks = max(int(sequences * load.mean_pages) + 1, 2048 // 32 + 1)
    stock = run(make_stock_scheduler(tiny_llama, num_blocks, **SETTINGS), load)
    ours = run(
        make_scheduler(tiny_llama, num_blocks * NUM_TIERS, POLICY, **SETTINGS), load
    )
    assert ours.num_preemptions <= stock.num_preemptions
    if name != "short chat":
        assert ours.num_steps < stock.num_steps


def test_the_reserve_trades_sequences_for_preemptions(tiny_llama: str) -> None:
    """Preemptions fall to none where the reserve covers all that may be generated."""
    load = loads()["balanced"]
    num_blocks = int(4 * load.mean_pages) * NUM_TIERS
    results = [
        run(
            make_scheduler(
                tiny_llama, num_blocks, POLICY | {"growth_reserve": growth}, **SETTINGS
            ),
            load,
        )
        for growth in (0, 64, 256, "all")
    ]
    preemptions = [result.num_preemptions for result in results]
    running = [result.max_num_running for result in results]
    assert preemptions == sorted(preemptions, reverse=True)
    assert preemptions[0] > 10
    assert preemptions[-1] == 0
    assert running == sorted(running, reverse=True)
    assert running[0] > running[-1]


@pytest.mark.parametrize("tiers", [1, 2, 3, 6])
def test_a_short_limit_is_kept_to(tiny_llama: str, tiers: int) -> None:
    """Outputs of up to twice the reserve are never preempted for their growth."""
    load = loads()["prompts"]
    policy = POLICY | {"tiers": tiers}
    for sequences in (4, 8, 12):
        num_blocks = int(sequences * load.mean_pages) * tiers
        result = run(make_scheduler(tiny_llama, num_blocks, policy, **SETTINGS), load)
        assert result.num_preemptions == 0
        assert result.max_num_running > sequences


def test_a_request_alone_needs_no_reserve(tiny_llama: str) -> None:
    """Otherwise a request that fills the pool would wait for ever."""
    scheduler = make_scheduler(
        tiny_llama,
        2048 // 32 * NUM_TIERS + 1,
        POLICY | {"growth_reserve": "all"},
        **SETTINGS,
    )
    result = run(scheduler, Load([(2000, 48, 40)] * 3))
    assert result == Result(0, result.num_steps, 1)


def test_limits_of_sequences_and_tokens_keep_their_meaning(tiny_llama: str) -> None:
    """vLLM's limits hold, however much memory is free."""
    scheduler = make_scheduler(
        tiny_llama,
        4000,
        POLICY,
        max_model_len=512,
        max_num_seqs=5,
        max_num_batched_tokens=192,
    )
    most = 0
    schedule = scheduler.schedule

    def watch(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        output = schedule(*args, **kwargs)
        most = max(most, output.total_num_scheduled_tokens)
        return output

    scheduler.schedule = watch
    result = run(scheduler, Load([(300, 20, 20)] * 12))
    assert result.max_num_running == 5
    assert most == 192
