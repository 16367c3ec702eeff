"""Our scheduler where vLLM's own scheduler is the measure."""

from typing import Any

import pytest
from vllm.v1.request import Request, RequestStatus

from tests.scheduling import (
    Driver,
    held_pages,
    make_request,
    make_scheduler,
    make_stock_scheduler,
    sampled,
)

SETTINGS = {"max_model_len": 512, "max_num_batched_tokens": 512}
WHOLE = {"name": "pyramid", "retention": 1.0}
COMPRESSED = {"exceed_length_to_compress": 8, "recent": 8}


def replayed(scheduler: Any, num_generated: int) -> list[int]:
    """Tokens of each of three steps that replay a prompt of 100 tokens."""
    scheduler.add_request(make_request("a", prompt=100, output=50))
    steps = []
    for step in range(num_generated + 3):
        if step == num_generated:
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        output = scheduler.schedule()
        steps.append(output.num_scheduled_tokens["a"])
        scheduler.update_from_output(output, sampled(scheduler, output))
    return steps[num_generated:]


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(WHOLE, id="retention 1.0"),
        pytest.param(WHOLE | {"evict": "chunk"}, id="by chunk"),
        pytest.param({"name": "pyramid", "min_context": 128}, id="short prompt"),
        pytest.param(WHOLE | COMPRESSED | {"recent": 64}, id="no group is due"),
    ],
)
def test_a_replay_that_evicts_nothing_is_one_chunk(
    tiny_llama: str, policy: dict[str, Any]
) -> None:
    """It costs as many steps as in stock vLLM."""
    stock = replayed(make_stock_scheduler(tiny_llama, 200, **SETTINGS), 20)
    assert stock == [120, 1, 1]
    scheduler = make_scheduler(tiny_llama, 200, policy, **SETTINGS)
    assert replayed(scheduler, 20) == stock
    scheduler.check_integrity()


def test_a_plan_counts_the_prompts_tokens_alone(tiny_llama: str) -> None:
    """Also if a replay goes on past the prompt's end."""
    scheduler = make_scheduler(tiny_llama, 200, WHOLE, **SETTINGS)
    scheduler.add_request(make_request("a", prompt=100, output=50))
    driver = Driver(scheduler)
    for _ in range(20):
        driver.step()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert driver.step().num_prompt_tokens == 100


@pytest.mark.parametrize("policy", [WHOLE | COMPRESSED, WHOLE | {"retention": 0.5}])
def test_a_replay_that_evicts_is_cut_at_the_prompts_end(
    tiny_llama: str, policy: dict[str, Any]
) -> None:
    scheduler = make_scheduler(
        tiny_llama, 200, policy | {"min_context": 32}, **SETTINGS
    )
    assert replayed(scheduler, 30)[0] == 100


def test_a_step_without_slots_takes_the_pages_of_a_hit(tiny_llama: str) -> None:
    """As vLLM's own steps that only take computed tokens over."""
    settings = SETTINGS | {"enable_prefix_caching": True}
    scheduler = make_scheduler(tiny_llama, 200, WHOLE, **settings)
    scheduler.add_request(make_request("a", prompt=100, output=50))
    Driver(scheduler).step()
    request = make_request("b", prompt=100, output=50)
    scheduler.add_request(request)
    manager = scheduler.kv_cache_manager
    pages, num_hit = manager.get_computed_blocks(request)[:2]
    assert num_hit == 96
    assert manager.allocate_slots(request, 0, num_hit, pages) is not None
    assert set(held_pages(scheduler, "b").values()) == {3}


def session(prompt: int, resumable: bool) -> Request:
    """A part of the streaming session "s"."""
    request = make_request("s", prompt, output=50)
    request.resumable = resumable
    return request


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("late", [False, True])
def test_the_end_of_a_refused_session_is_not_served(
    tiny_llama: str, num_parts: int, late: bool
) -> None:
    """Whether or not the client knows of the refusal when it ends the session."""
    scheduler = make_scheduler(tiny_llama, 60, WHOLE, **SETTINGS)
    driver = Driver(scheduler)
    for _ in range(num_parts):
        scheduler.add_request(session(100, resumable=True))
    if late:
        driver.step()
        assert driver.finished == {"s": "error"}
    scheduler.add_request(session(1, resumable=False))
    assert not scheduler.requests
    driver.run()
    assert driver.finished == {"s": "error"}
    assert not any(plan.num_reqs for plan in driver.plans)
    assert scheduler.kv_counters.num_refused_requests == num_parts


@pytest.mark.parametrize("ended", ["by its end", "aborted", "all aborted"])
def test_the_name_of_an_ended_session_is_free(tiny_llama: str, ended: str) -> None:
    """No end of an aborted session follows: its name means nothing any more."""
    scheduler = make_scheduler(tiny_llama, 60, WHOLE, **SETTINGS)
    driver = Driver(scheduler)
    scheduler.add_request(session(100, resumable=True))
    driver.step()
    if ended == "by its end":
        scheduler.add_request(session(1, resumable=False))
    else:
        ids = None if ended == "all aborted" else iter(["s"])
        scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
    request = make_request("s", prompt=100, output=5)
    scheduler.add_request(request)
    driver.run()
    assert driver.finished == {"s": "length"}
    assert request.num_output_tokens == 5
