"""``pyramid-vllm simulate``: exact figures, what the clock counts, and errors."""

import json
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pyramid_vllm.plan import PromptWindow, StepPlan
from pyramid_vllm.policy import resolve_policy
from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.simulate.clock import StepWork, WorkModel, step_seconds
from pyramid_vllm.tools.simulate.device import device_names, load_device
from pyramid_vllm.tools.simulate.engine import EngineSettings, SimulatedEngine
from pyramid_vllm.tools.simulate.figures import run_figures
from pyramid_vllm.tools.simulate.loads import (
    Load,
    Session,
    Turn,
    named_load,
    piece_tokens,
)
from pyramid_vllm.tools.simulate.model import load_model
from pyramid_vllm.tools.simulate.pages import saved_tokens
from pyramid_vllm.tools.simulate.run import Simulation
from pyramid_vllm.tools.simulate.slo import find_capacity
from pyramid_vllm.tools.simulate.trace import read_trace
from pyramid_vllm.tools.sizes import parse_seconds
from tests import simulated

DEVICE = load_device("h100")


def settings(**changes: Any) -> EngineSettings:
    """A small engine: SmolLM2's shape with memory for a few sequences."""
    model = load_model("SmolLM2-135M", None, 1)
    page_bytes = 32 * int(model.token_bytes) * model.num_layers
    base = EngineSettings(
        model=model,
        kv_bytes=400 * page_bytes,
        max_model_len=8192,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        block_size=32,
    )
    return replace(base, **changes)


def run(load: Load, policy: str | None = None, **changes: Any) -> Simulation:
    cascade = changes.pop("cascade", False)
    resolved = None if policy is None else resolve_policy(policy)
    name = policy or "none"
    engine = SimulatedEngine(settings(**changes), resolved)
    return Simulation(name, engine, DEVICE, load, False, cascade).run()


def small(name: str, **changes: Any) -> Load:
    lengths = {"num_requests": 8, "prompt_tokens": 300, "output_tokens": 20}
    return named_load(name, lengths | changes)


# To the digit.


def test_small_loads_give_the_figures_of_the_repository() -> None:
    expected = json.loads(simulated.FILE.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(simulated.figures()))
    assert found == expected, (
        "scheduling has changed: `python -m tests.simulated` writes the figures anew; "
        "the commit says why"
    )


def test_the_figures_see_the_policy() -> None:
    expected = json.loads(simulated.FILE.read_text(encoding="utf-8"))
    assert set(expected) == {"unshared", "shared", "documents", "trace"}
    for load, sides in expected.items():
        assert sides["pyramid"]["num_compactions"] > 0, load
        assert sides["none"]["num_compactions"] == 0
        assert sides["pyramid"] != sides["none"]


# Requests.


@pytest.mark.parametrize("policy", [None, "pyramid"])
def test_every_request_is_served_to_its_end(policy: str | None) -> None:
    done = run(small("unshared"), policy)
    assert len(done.requests) == 8
    for request in done.requests.values():
        assert request.arrival <= request.first_token < request.finish
    # A last token is sampled, never computed: 299 positions and 1 are the prompt's.
    assert done.num_prompt_tokens_computed == 8 * 300


def test_a_shared_prefix_is_hit_and_another_is_not() -> None:
    load = small("shared", shared_prefix=640, rate=1.0)
    assert run_figures(run(load))["prefix_hit_rate"] > 0.5
    assert run_figures(run(load, prefix_caching=False))["prefix_hit_rate"] == 0
    alone = small("documents", shared_prefix=640, num_prefixes=8, rate=1.0)
    assert run_figures(run(alone))["prefix_hit_rate"] == 0


def test_a_turn_goes_on_from_the_answer_before_it() -> None:
    load = small("chat", num_requests=2, turns=3, think_time=1.0, spread=0.0)
    done = run(load)
    assert len(done.requests) == 6
    for index in range(2):
        first, second, third = (done.requests[f"{index}.{turn}"] for turn in range(3))
        prefix = load.sessions[index].turns[0].num_tokens
        assert first.num_prompt_tokens == prefix
        assert second.num_prompt_tokens == prefix + 20 + 300
        assert second.arrival > first.finish
        assert third.arrival > second.finish
        # All full pages of the turn before are hit, answer included.
        assert second.num_cached_tokens >= (prefix + 19) // 32 * 32


def test_clients_wait_for_answers() -> None:
    done = run(small("unshared", clients=2))
    assert max(step.num_running for step in done.steps) == 2
    arrivals = sorted(r.arrival for r in done.requests.values())
    assert arrivals[:2] == [0, 0]
    assert arrivals[2] > 0


def test_memory_that_binds_is_shared_by_more_sequences_under_a_policy() -> None:
    load = small("unshared", num_requests=24, prompt_tokens=1024)
    stock, ours = run(load), run(load, "pyramid")
    most = [max(step.num_running for step in side.steps) for side in (stock, ours)]
    assert most[1] > 1.3 * most[0]
    assert ours.num_compactions == 24


def test_pages_add_up() -> None:
    done = run(small("unshared", num_requests=40), "pyramid")
    assert done.pages
    for count in done.pages:
        assert count.running + count.cached + count.free == pytest.approx(1)
    assert max(count.running for count in done.pages) > 0


def test_time_of_the_scheduler_counts_unless_it_is_left_out() -> None:
    load = small("unshared")
    exact = [run(load).requests["0.0"].finish for _ in range(2)]
    assert exact[0] == exact[1]
    # A device so fast that steps are as long as the scheduler takes.
    fast = DEVICE.changed({"step_ms": 0.0})
    device = fast.model_copy(
        update={"bandwidth_gb_s": 1e12, "tflops": {"bfloat16": 1e12}}
    )
    for cpu_time in (False, True):
        engine = SimulatedEngine(settings(), None)
        done = Simulation("none", engine, device, load, cpu_time).run()
        cpu_s = sum(step.cpu_s for step in done.steps)
        assert (run_figures(done)["seconds"] >= 0.9 * cpu_s) is cpu_time


# The clock, by hand.


def test_work_of_a_decode_step() -> None:
    model = load_model("Llama-3-8B", None, 1)
    work = WorkModel(model, (32,), {}).step(np.array([999, 99]), np.array([1, 1]), None)
    params = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    logits = 4096 * 128256
    assert work.weight_bytes == 2 * (params + logits)
    assert work.linear_flops == 2 * 2 * (params + logits)
    assert work.decode_bytes == 32 * 4096 * (1000 + 100)
    assert work.decode_flops == 32 * 4 * 128 * 32 * (1000 + 100)
    assert work.prompt_bytes == 32 * 4096 * 2  # what is written
    assert work.score_flops == work.move_bytes == work.num_all_reduces == 0


def test_work_of_a_compaction_follows_the_plan() -> None:
    model = load_model("Llama-3-8B", None, 1)
    policy = resolve_policy("pyramid")
    assert policy is not None
    window = PromptWindow("a", "pyramid", 1000, 100, False, (1000, 400), 64)
    plan = StepPlan(1, 1000, (window,), (), frozenset())
    model_of = WorkModel(model, (8, 24), {"pyramid": policy})
    work = model_of.step(np.array([0]), np.array([1000]), plan, req_ids=["a"])
    # The first tier keeps all: it neither scores nor moves.
    assert work.score_flops == 24 * 2 * 128 * 32 * 100 * 1000
    assert work.num_compactions == 24
    assert work.move_bytes == 24 * (4 * 4 * 8 * 1000 + 2 * 400 * 4096)
    later = StepPlan(1, 0, (), (), frozenset())
    after = model_of.step(np.array([1000]), np.array([1]), later, req_ids=["a"])
    assert after.decode_bytes == 4096 * (8 * 1001 + 24 * 401)
    gone = StepPlan(1, 0, (), (), frozenset({"a"}))
    after = model_of.step(np.array([1000]), np.array([1]), gone, req_ids=["a"])
    assert after.decode_bytes == 4096 * 32 * 1001


def test_tensor_parallel_splits_work_and_adds_all_reduces() -> None:
    one, four = (load_model("Llama-3-70B", None, n) for n in (1, 4))
    works = [
        WorkModel(model, (80,), {}).step(np.array([500]), np.array([1]), None)
        for model in (one, four)
    ]
    assert works[1].weight_bytes == works[0].weight_bytes / 4
    assert works[1].decode_bytes == works[0].decode_bytes / 4
    assert works[1].num_all_reduces == 160
    assert works[1].link_bytes == 160 * 8192 * 2 * 2 * 3 / 4


def test_sliding_windows_and_experts() -> None:
    model = load_model("gpt-oss-20b", None, 1)
    assert sum(window == 128 for window in model.windows) == 12
    work = WorkModel(model, (12,), {}).step(np.array([9999]), np.array([1]), None)
    assert work.decode_bytes == model.token_bytes * (12 * 10_000 + 12 * 129)
    # Four of 32 experts of a single row; nearly all of a large batch.
    assert model.layer_bytes(1) < 0.25 * model.layer_bytes(1000)
    assert 12e9 < model.weight_bytes < 15e9


def test_a_step_takes_the_longer_of_bytes_and_flops() -> None:
    model = load_model("Llama-3-8B", None, 1)
    device = DEVICE.changed({"step_ms": 0.0})
    reads = StepWork(weight_bytes=3.35e12 * 0.8, linear_flops=1.0)
    computes = StepWork(weight_bytes=1.0, linear_flops=989e12 * 0.6)
    assert step_seconds(reads, model, device) == pytest.approx(1)
    assert step_seconds(computes, model, device) == pytest.approx(1)
    both = StepWork(*np.array([astuple(reads), astuple(computes)]).T)
    assert step_seconds(both, model, device).tolist() == pytest.approx([1, 1])


def test_shared_pages_are_read_once_by_cascade() -> None:
    load = small("shared", shared_prefix=640, num_requests=6, output_tokens=40)
    again = run(load, cascade=True)
    assert run_figures(again)["seconds"] < run_figures(run(load))["seconds"]


def test_saved_tokens_are_those_of_pages_with_several_readers() -> None:
    engine = SimulatedEngine(settings(), None)
    prompt = piece_tokens((1, 330))
    for name in ("a", "b", "c"):
        request = engine.request(name, [*prompt, ord(name)], 5, 0.0)
        engine.scheduler.add_request(request)
        engine.scheduler.schedule()
    # Two of three readers of each of ten full pages are spared.
    saved = saved_tokens(engine.scheduler, ("a", "b", "c"))
    assert saved == pytest.approx(2 * 10 * 32 * 30)


@pytest.mark.parametrize("name", device_names())
def test_devices_name_a_source_for_each_figure(name: str) -> None:
    assert load_device(name).name == name
    file = Path(__file__).parents[1] / "configs" / "gpus" / f"{name}.yaml"
    for key in ("memory_gb", "bandwidth_gb_s", "tflops"):
        (line,) = (n for n in file.read_text().splitlines() if n.startswith(key))
        assert "#" in line


# Service levels.


def test_the_highest_rate_is_found_by_bisection() -> None:
    load = small("unshared", rate=2.0)
    tried = []

    def figures(of: Load) -> dict[str, float]:
        tried.append(of.rate)
        return {"ttft_p99_s": of.rate / 10, "tpot_p99_s": 0.0}

    found = find_capacity(load, {"ttft_p99_s": 0.05 * load.rate}, figures)
    assert found.speed == pytest.approx(0.5, rel=0.05)
    assert found.num_engines == 2 or found.speed < 0.5
    never = find_capacity(load, {"ttft_p99_s": 1e-9}, figures)
    assert never.num_engines is None


@pytest.mark.parametrize(("text", "seconds"), [("2s", 2.0), ("50ms", 0.05)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_seconds("--slo-ttft", text) == pytest.approx(seconds)


# Traces.


def line(**changes: Any) -> str:
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    return json.dumps(row | changes)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "trace.jsonl"
    lines = [line(), line(timestamp=3000, hash_ids=[1, 3]), line(output_length=0)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_a_trace_is_read(trace: Path) -> None:
    load = read_trace(trace, None).scaled(0.5)
    assert [session.arrival for session in load.sessions] == [0, 0, 6]
    assert load.sessions[2].turns == (Turn(((1, 512), (3, 88)), 5),)
    assert load.sessions[1].turns[0].num_outputs == 1
    assert len(read_trace(trace, 2).sessions) == 2


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("{", "line 2"),
        ("[]", "should be an object"),
        (line(input_length="x"), "input_length is 'x'"),
        (line(hash_ids=[1]), "valid are 2 ids"),
        (line(timestamp=-1), "timestamp is -1"),
        ('{"timestamp": 0}', "Field required"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, broken: str, says: str) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text(f"{line()}\n{broken}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2") as caught:
        read_trace(file, None)
    assert says in str(caught.value)


# The command.


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_the_command_writes_the_keys_that_it_promises(
    tmp_path: Path, trace: Path
) -> None:
    file = tmp_path / "out.json"
    result = command(
        *("SmolLM2-135M", "--trace", str(trace), "--kv-policy", "pyramid"),
        *("--kv-policy", "uniform", "--kv-policy-config", '{"retention": 0.5}'),
        *("--no-cpu-time", "--json", str(file), "--plots", str(tmp_path / "plots")),
        *("--slo-ttft", "2s", "--slo-tpot", "50ms", "--kv-memory", "512MiB"),
    )
    assert result.exit_code == 0, result.output
    runs = json.loads(file.read_text())["runs"]
    assert [run["policy"] for run in runs] == ["none", "pyramid", "uniform"]
    promised = (
        "tokens_per_s requests_per_s ttft_p50_s ttft_p99_s tpot_p50_s max_num_running "
        "num_preemptions prefix_hit_rate num_prompt_tokens_computed cpu_ms_per_step"
    )
    for run in runs:
        assert set(promised.split()) <= set(run)
        assert run["capacity"]["num_engines"] == 1
    assert (tmp_path / "plots" / "simulate.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("SmolLM2-135M", "--gpu", "h99"), "--gpu is 'h99': valid are a100-80"),
        (("Llama-3-70B",), "141.1 GB of weights"),
        (("SmolLM2-135M", "--load", "mix"), "--load is 'mix': valid is one of"),
        (("SmolLM2-135M", "--trace", "none.jsonl"), "none.jsonl"),
        (
            ("SmolLM2-135M", "--efficiency", '{"flops": 2}'),
            "efficiency.flops is 2",
        ),
        (("SmolLM2-135M", "--tensor-parallel", "2"), "valid are divisors"),
        (("SmolLM2-135M", "--rate", "1", "--clients", "2"), "--clients is 2"),
        (("SmolLM2-135M", "--slo-ttft", "fast"), "--slo-ttft is 'fast'"),
        (("SmolLM2-135M", "--slo-ttft", "2s"), "need arrivals"),
        (("SmolLM2-135M", "--kv-policy", "pyramide"), "kv_policy is 'pyramide'"),
        (("SmolLM2-135M", "--dtype", "int8"), "dtype is 'int8'"),
        (("SmolLM2-135M", "--prompt-tokens", "9000"), "valid is up to --max-model-len"),
        (("SmolLM2-135M", "--kv-memory", "8MiB"), "max_model_len"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], says: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_a_request_that_ends_early_is_an_error() -> None:
    load = Load("long", (Session((Turn(((1, 300),), 200),)),))
    engine = SimulatedEngine(settings(max_model_len=400), None)
    engine.max_model_len = 500  # what the engine itself does not know
    simulation = Simulation("none", engine, DEVICE, load)
    with pytest.raises(RuntimeError, match=r"300 \+ 200 tokens ended after 100"):
        simulation.run()
