"""What a worker records as kept, against the keys that lie in its cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.worker.layer import TieredLayer
from pyramid_vllm.worker.record import check_recordable
from tests.engines import (
    close,
    drain,
    held_kv,
    make_llm,
    random_prompts,
    scheduler_of,
    start,
    worker_of,
)
from tests.models import TINY_LLAMA, save_tiny_llama

NUM_LAYERS = TINY_LLAMA["num_hidden_layers"]
PROMPTS = random_prompts([300, 40, 170], seed=5)
NUM_OUTPUT = 36
MAX_TOKENS = 56
POLICY = {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 3}
GROUPS = {"exceed_length_to_compress": 8, "gen_queries": 8}

#: Policies, and settings of their engines.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "head": (POLICY | {"selection": "head"}, {"enable_prefix_caching": True}),
    "chunk": (POLICY | {"evict": "chunk"}, {"max_num_batched_tokens": 96}),
    "groups": (POLICY | GROUPS | {"selection": "head"}, {}),
    "pruned": (
        POLICY | GROUPS | {"prune_from": 2, "evict": "chunk"},
        {"max_num_batched_tokens": 128},
    ),
}

LAYER = [object.__new__(TieredLayer)]


@pytest.fixture(scope="module")
def blind_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama whose attention adds nothing to its rows.

    Its keys depend on token and position alone, in every layer and whatever was
    evicted, so that a key in the cache shows which position it is of.
    """
    folder = tmp_path_factory.mktemp("blind-llama")
    save_tiny_llama(folder, TINY_LLAMA)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(folder)
    return str(folder)


@contextmanager
def engine(model: str, **settings: Any) -> Iterator[Any]:
    """An engine that is closed whatever happens."""
    llm = make_llm(model, **settings)
    try:
        yield llm
    finally:
        close(llm)


@pytest.fixture(scope="module")
def stock(blind_llama: str) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Keys and values of all tokens, by request and layer, from stock vLLM."""
    with engine(blind_llama) as llm:
        req_ids = start(llm, PROMPTS, MAX_TOKENS)
        step_until(llm, MAX_TOKENS - 1)
        layers = range(NUM_LAYERS)
        return [[held_kv(llm, req_id, layer) for layer in layers] for req_id in req_ids]


def step_until(llm: Any, num_output: int) -> None:
    """Step until every request has so many output tokens."""
    requests = scheduler_of(llm).requests.values()
    while min(request.num_output_tokens for request in requests) < num_output:
        llm.llm_engine.step()


def assert_recorded(llm: Any, req_ids: list[str], stock: Any) -> None:
    """The record's positions are those of the keys and values in the cache."""
    (record,) = llm.collective_rpc("kv_policy_record")
    requests = scheduler_of(llm).requests
    for req_id, full in zip(req_ids, stock, strict=True):
        for layer in range(NUM_LAYERS):
            heads = torch.tensor(record["held"][req_id][layer])
            key, value = held_kv(llm, req_id, layer)
            assert heads.shape == (key.shape[1], len(key))
            assert (heads[:, -1] == requests[req_id].num_computed_tokens - 1).all()
            for head, positions in enumerate(heads):
                assert (positions.diff() > 0).all()
                keys = key[:, head].double(), full[layer][0][:, head].double()
                nearest = torch.cdist(*keys).min(dim=1)
                assert nearest.values.max() < 1e-3
                assert nearest.indices.tolist() == positions.tolist()
                torch.testing.assert_close(
                    value[:, head], full[layer][1][positions, head]
                )


def num_held(record: Any, req_id: str) -> list[int]:
    return [len(layer[0]) for layer in record["held"][req_id]]


@pytest.mark.parametrize(
    "case",
    ["head", "groups", "pruned", pytest.param("chunk", marks=pytest.mark.slow)],
)
def test_the_record_is_what_the_cache_holds(
    case: str, blind_llama: str, stock: Any
) -> None:
    """This holds for requests in one batch, while they generate, and after a
    preemption."""
    config, settings = CASES[case]
    policy = {"kv_policy": "pyramid-by-depth", "kv_policy_config": config}
    with engine(blind_llama, **policy, **settings) as llm:
        assert llm.collective_rpc("kv_policy_record") == [{}]
        llm.collective_rpc("record_kv_policy")
        req_ids = start(llm, PROMPTS, MAX_TOKENS)
        step_until(llm, NUM_OUTPUT)
        assert_recorded(llm, req_ids, stock)
        (record,) = llm.collective_rpc("kv_policy_record")
        assert record["tiers"] == [0, 0, 1, 1, 2, 2]
        lengths = num_held(record, req_ids[0])
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[-1] < lengths[0] < len(PROMPTS[0])
        scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
        step_until(llm, NUM_OUTPUT + 1)
        assert_recorded(llm, req_ids, stock)


def test_a_request_is_followed_once_it_starts_afresh(blind_llama: str) -> None:
    """Nobody knows what was evicted before the record began."""
    policy = {"kv_policy": "pyramid-by-depth", "kv_policy_config": POLICY}
    with engine(blind_llama, **policy) as llm:
        req_ids = start(llm, PROMPTS[:2], 4)
        llm.collective_rpc("record_kv_policy")
        llm.llm_engine.step()
        (record,) = llm.collective_rpc("kv_policy_record")
        assert set(record["held"]) == {req_ids[1]}, "the second one is held whole"
        scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
        drain(llm)
        (record,) = llm.collective_rpc("kv_policy_record")
        assert set(record["held"]) == set(req_ids), "what finished stays"
        llm.collective_rpc("record_kv_policy", args=(False,))
        assert llm.collective_rpc("kv_policy_record") == [{}]
        assert worker_of(llm).tier_state.record is None


def config(ranks: int = 1, speculative: Any = None) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        speculative_config=speculative,
    )


@pytest.mark.parametrize(
    ("layers", "vllm_config", "message"),
    [
        ([], config(), "no layer of the model"),
        (LAYER, config(ranks=2), "tensor_parallel_size=2: valid is 1"),
        (LAYER, config(speculative=object()), "with speculative_config"),
    ],
)
def test_what_is_not_followed_is_refused(
    layers: list[Any], vllm_config: Any, message: str
) -> None:
    check_recordable(LAYER, config())
    with pytest.raises(KVPolicyError, match=message):
        check_recordable(layers, vllm_config)
