"""Faults that would be silent: each is provoked."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from pyramid_vllm.attention.tiered import TieredBuilder
from pyramid_vllm.kernels import on_torch
from pyramid_vllm.kernels.spans import Spans
from pyramid_vllm.plan import PromptWindow, StepPlan, plan_of
from pyramid_vllm.policy import KVPolicyError, RequestPolicies, requests, resolve_policy
from pyramid_vllm.policy.budgets import pyramidinfer, retention
from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.spec import TierAttentionSpec
from pyramid_vllm.stats import TIMES_ATTRIBUTE, PolicyStats
from pyramid_vllm.tools.simulate.engine import sampled
from pyramid_vllm.worker import prune
from pyramid_vllm.worker.generated import GeneratedQueries, QueryShape
from pyramid_vllm.worker.scales import KeyScales
from pyramid_vllm.worker.state import WorkerState
from pyramid_vllm.worker.timing import HostTimer, with_times
from tests.engines import (
    close,
    drain,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
    worker_of,
)
from tests.scheduling import make_config, make_request, make_scheduler, scheduler_from
from tests.test_admission import SETTINGS, Load, run

POLICY: dict[str, Any] = {"base": "pyramid-by-depth", "tiers": 3}
COMPRESSED: dict[str, Any] = {
    "retention": 0.4,
    "recent": 8,
    "min_context": 24,
    "exceed_length_to_compress": 4,
    "gen_queries": 8,
}


# Retentions of requests.


def _count(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The calls of a function from now on."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    patch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize(
    ("policy", "solver", "times"),
    [
        ("pyramid-by-depth", (retention, "growths"), 0),
        ({"layer_weights": [*range(1, 33)]}, (retention, "growths"), 1),
        ({"base": "pyramidinfer", "recent_ratio": 0.0}, (pyramidinfer, "_fall"), 32),
    ],
)
def test_ever_new_retentions_make_few_rules_and_those_cheaply(
    policy: Any, solver: Any, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand at most, without validating all settings again, and without solving
    anew for the shares of layers; a second round makes none."""
    server = resolve_policy(policy)
    assert server is not None
    policies = RequestPolicies(server, 32)
    rules = _count(monkeypatch, requests, "LengthRule")
    validations = _count(monkeypatch, PolicyConfig, "model_validate")
    passes = _count(monkeypatch, *solver)
    for _ in range(2):
        for i in range(10_000):
            policies.rule_for({"kv_retention": 0.5 + i / 20_000})
    assert not validations
    assert 400 < len(rules) <= requests.RETENTIONS
    assert len(passes) <= times * len(rules) + 64  # once for the weights' bounds


def test_a_rounded_retention_is_one_that_can_be_asked_for() -> None:
    policies = RequestPolicies(resolve_policy(POLICY), 6)  # type: ignore[arg-type]
    for asked, found in (
        (0.7, 0.7),
        (0.70004, 0.7),
        (1e-9, 0.001),
        (0.9999, 1),
        (1, 1),
    ):
        rule = policies.rule_for({"kv_retention": asked})
        assert rule.config.retention == found


@pytest.mark.parametrize("wish", [0, -0.5, 1.001, float("nan"), float("inf"), 10**400])
def test_a_retention_that_cannot_be_is_refused_without_a_validation(
    wish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = RequestPolicies(resolve_policy(POLICY), 6)  # type: ignore[arg-type]
    monkeypatch.setattr(PolicyConfig, "model_validate", None)
    with pytest.raises(
        KVPolicyError, match=r"kv_retention is .* above 0 and at most 1"
    ):
        policies.rule_for({"kv_retention": wish})


def test_a_retention_below_the_recent_window_is_refused() -> None:
    server = resolve_policy(POLICY, {"recent_ratio": 0.3})
    with pytest.raises(
        KVPolicyError, match=r"recent_ratio=0.3 must be below retention"
    ):
        RequestPolicies(server, 6).rule_for({"kv_retention": 0.2})  # type: ignore[arg-type]


# Admission.


def test_admission_without_the_whole_prompt_is_refused(tiny_llama: str) -> None:
    """By the scheduler too: a configuration may have changed since it was made."""
    config = make_config(tiny_llama, POLICY)
    config.scheduler_config.scheduler_reserve_full_isl = False
    with pytest.raises(KVPolicyError) as error:
        scheduler_from(config, 100)
    assert "scheduler_reserve_full_isl=False" in str(error.value)
    assert "growth_reserve" in str(error.value)


def test_why_admission_without_the_whole_prompt_is_refused(tiny_llama: str) -> None:
    """Requests that are never preempted with it are preempted over and over."""
    load = Load([(768, 128, 128)] * 40)
    results = []
    for reserves in (True, False):
        num_blocks = int(8 * load.mean_pages) * 3
        scheduler = make_scheduler(tiny_llama, num_blocks, POLICY, **SETTINGS)
        assert scheduler.scheduler_reserve_full_isl
        scheduler.scheduler_reserve_full_isl = reserves
        results.append(run(scheduler, load).num_preemptions)
    assert results[0] == 0
    assert results[1] > 10


# Statistics that nobody asks for.


@pytest.mark.parametrize("is_asked", [True, False])
def test_times_of_compactions_do_not_pile_up(tiny_llama: str, is_asked: bool) -> None:
    """Neither without statistics nor with them."""
    scheduler = make_scheduler(tiny_llama, 200, POLICY)
    scheduler.log_stats = scheduler._tells_stats = is_asked
    scheduler.kv_cache_manager.prefix_cache_stats = PrefixCacheStats()
    scheduler.kv_cache_manager.log_stats = is_asked
    scheduler.add_request(make_request("a", prompt=400, output=50))
    told: list[float] = []
    while scheduler.has_requests():
        step = scheduler.schedule()
        output = sampled(scheduler, step)
        setattr(output, TIMES_ATTRIBUTE, (0.5, 0.25))
        outputs = scheduler.update_from_output(step, output)
        assert not scheduler._statistics._times
        for of_client in outputs.values():
            if of_client.scheduler_stats is not None:
                stats = of_client.scheduler_stats.kv_connector_stats
                told += PolicyStats.of(stats).compaction_times
    assert bool(told) == is_asked


# Rows of tensor-parallel ranks.


class _Ranks:
    """A group whose first rank has run already."""

    def __init__(self, chosen: torch.Tensor) -> None:
        self._chosen = chosen

    def broadcast(self, index: torch.Tensor, src: int = 0) -> torch.Tensor:
        assert src == 0
        return index.copy_(self._chosen)


def _chosen_rows(kept: list[int], group: Any, monkeypatch: Any) -> torch.Tensor:
    """What one rank's pruner gives to the second tier of one prompt of six rows."""
    monkeypatch.setattr(prune, "get_tp_group", lambda: group)
    starts = torch.tensor([[0, 6], [0, 3]], dtype=torch.int32)
    pruner = prune.RowPruner(torch.nn.Module(), [], ())
    pruner._step = SimpleNamespace(  # type: ignore[assignment]
        starts=starts,
        window_of=torch.zeros(2, 1, dtype=torch.int32),
        row_offsets=torch.zeros(2, 1, dtype=torch.int32),
        rows=SimpleNamespace(total_rows=[6, 3]),
        kernels=on_torch,
    )
    pruner.set_rows(0, torch.tensor(kept, dtype=torch.int32))
    return pruner._kept[1]


def test_ranks_whose_sums_differ_prune_the_same_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks compute the first one's."""
    alone = SimpleNamespace(broadcast=lambda index, src=0: index)
    first = _chosen_rows([0, 2, 5], alone, monkeypatch)
    assert first.tolist() == [0, 2, 5]
    other = _chosen_rows([0, 3, 5], _Ranks(first), monkeypatch)
    assert other.tolist() == first.tolist()


# Queries of generated tokens.


@pytest.fixture
def queries() -> GeneratedQueries:
    """Places of two requests, four queries each; none was copied."""
    shape = QueryShape(1, 2, 4, 2, 8, torch.float32)
    return GeneratedQueries(shape, 16, torch.device("cpu"), on_torch)  # type: ignore[arg-type]


def _verify(queries: GeneratedQueries) -> None:
    fields = {"num_queries": 2}
    columns = [[fields.get(name, 0)] for name in Spans._fields]
    spans = Spans.of(torch.tensor(columns, dtype=torch.int32))
    queries.verify(torch.zeros(1, dtype=torch.int64), spans, torch.zeros(1).int())


def test_missing_queries_are_found_before_tokens_leave(
    queries: GeneratedQueries,
) -> None:
    """The device is behind: its report is there once the output is, and not before."""

    class Later(AsyncModelRunnerOutput):
        def get_output(self) -> ModelRunnerOutput:
            _verify(queries)
            return ModelRunnerOutput(req_ids=[], req_id_to_index={})

    output = with_times(Later(), HostTimer(), queries.check)
    with pytest.raises(RuntimeError, match=r"2 queries .* were not copied"):
        output.get_output()
    with pytest.raises(RuntimeError, match="were not copied"):
        with_times(ModelRunnerOutput([], {}), HostTimer(), queries.check)


@pytest.fixture(scope="module")
def llm(tiny_llama: str) -> Iterator[Any]:
    """An engine that compresses what it generates, as ``LLM()`` makes it."""
    made = make_llm(
        tiny_llama, kv_policy="pyramid-by-depth", kv_policy_config=COMPRESSED
    )
    yield made
    close(made)


def test_an_engine_nobody_watches_keeps_no_times(llm: Any) -> None:
    """``LLM()`` has ``disable_log_stats=True``."""
    scheduler = scheduler_of(llm)
    assert not scheduler.log_stats
    generate(llm, random_prompts([200, 300]), 40)
    assert scheduler.kv_counters.num_compactions > 2
    assert not scheduler._statistics._times
    assert not worker_of(llm).tier_state.timer.take()


def test_a_layer_s_new_factor_is_used(llm: Any) -> None:
    """As after a reload that replaces it; the memory of the old one may be gone."""
    worker = worker_of(llm)
    (layer,) = [part for part in worker.tier_layers if part.index == 3]
    name = "model.layers.3.self_attn.attn"
    attention = worker.compilation_config.static_forward_context[name]
    for scale in ("_k_scale", "_q_scale"):
        setattr(attention, scale, getattr(attention, scale).clone())
    generate(llm, random_prompts([200]), 2)
    addresses = layer.group.attention.key_scales.tolist()
    assert attention._k_scale.data_ptr() in addresses
    assert layer._query_scale().data_ptr() == attention._q_scale.data_ptr()


def test_the_step_that_misses_queries_raises_itself(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the next one, whose tokens are wrong already. The engine is done with."""
    from vllm import SamplingParams

    plans: list[StepPlan | None] = []
    worker = type(worker_of(llm))
    execute = worker.execute_model
    monkeypatch.setattr(
        worker,
        "execute_model",
        lambda self, step: plans.append(plan_of(step)) or execute(self, step),
    )
    monkeypatch.setattr(GeneratedQueries, "write", lambda *_: None)
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    (prompt,) = random_prompts([200])
    llm.llm_engine.add_request("a", {"prompt_token_ids": prompt}, sampling)
    with pytest.raises(RuntimeError, match="were not copied"):
        drain(llm)
    compressing = [bool(plan and plan.generated) for plan in plans]
    assert compressing.index(True) == len(plans) - 1


# Factors of quantized keys.


def _plan(*windows: PromptWindow) -> StepPlan:
    return StepPlan(1, 5, windows, (), frozenset())


def test_addresses_of_factors_are_those_of_a_step_that_scores() -> None:
    layers = [SimpleNamespace(_k_scale=torch.tensor(1.0)) for _ in range(3)]
    scales = KeyScales(layers, torch.device("cpu"))
    held = scales.addresses
    step: Any = SimpleNamespace(begin=lambda _: None, generated=None)
    counters: Any = SimpleNamespace(num_scheduled=0)
    state = WorkerState(step, {}, counters, 1, None, HostTimer(), key_scales=[scales])
    layers[1]._k_scale = torch.tensor([2.0])
    state.begin(_plan())
    assert layers[1]._k_scale.data_ptr() not in held.tolist()  # it costs nothing
    state.begin(_plan(PromptWindow("a", "pyramid", 10, 2, False, (5,), 2)))
    assert held.tolist() == [layer._k_scale.data_ptr() for layer in layers]
    layers[1]._k_scale = torch.ones(2)
    with pytest.raises(KVPolicyError, match="_k_scale of 2"):
        scales.refresh()


# Engines without a policy in the same process.


class _Stock:
    """A builder that can do everything."""

    supports_update_block_table = True

    @classmethod
    def get_cudagraph_support(cls, config: Any, spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.ALWAYS


class _Wrapped(TieredBuilder, _Stock):
    pass


def test_a_later_engine_without_a_policy_has_all_graphs() -> None:
    """The wrapped backends stay; their builders are stock for specs of no tier."""
    plain = FullAttentionSpec(
        block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32
    )
    tier = TierAttentionSpec.of(plain, 0, 6)
    config: Any = None
    always, uniform = AttentionCGSupport.ALWAYS, AttentionCGSupport.UNIFORM_BATCH
    assert _Wrapped.get_cudagraph_support(config, plain) is always
    assert _Wrapped.get_cudagraph_support(config, tier) is uniform
    builder, other = _Wrapped(), _Wrapped()
    tiers: Any = SimpleNamespace()
    other.bind(tiers, 1)
    assert builder.supports_update_block_table
    assert not other.supports_update_block_table
