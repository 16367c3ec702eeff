"""Engines on a Ray cluster of logical GPUs; executors that would go past the worker."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.platforms import current_platform
from vllm.v1.executor.ray_executor import RayDistributedExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from pyramid_vllm.checks import LEGACY_RAY_EXECUTOR
from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.ray import executor, platform
from tests.engines import (
    DEFAULTS,
    close,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
    worker_of,
)
from tests.one_engine import save_tokenizer
from tests.ray_cluster import ROOT, ray_cluster
from tests.ray_driver import answer
from tests.test_engine_args import engine_config
from tests.test_serve import VLLM

#: Prunes rows, one choice of tokens a layer, compresses generated tokens.
POLICY = {
    "kv_policy": "pyramidinfer",
    "kv_policy_config": {
        "recent": 8,
        "prefill_recent_ratio": 0.05,
        "prefill_decay_ratio": 0.6,
        "exceed_length_to_compress": 8,
    },
}
#: All in one batch: the engine's own policy; one choice of tokens a layer, and one a
#: KV head, of what a prompt left in the cache; everything.
WISHES = ["pyramidinfer", "uniform", "pyramid", "none"]
LOAD: dict[str, Any] = {"lengths": [300, 97], "wishes": WISHES, "max_tokens": 32}


@pytest.mark.timeout(400)
def test_two_nodes_answer_as_one_process(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on two nodes have one of the two KV heads each. Tokens and counts are
    those of one rank without Ray, whatever the request's policy."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = make_llm(tiny_llama, **POLICY, distributed_executor_backend="mp")
    expected = answer(llm, **LOAD)
    (counts,) = llm.collective_rpc("kv_policy_stats")
    counters = scheduler_of(llm).kv_counters
    close(llm)
    for wish in WISHES[:-1]:
        assert expected[wish][0] != expected["none"][0], "the policy changes nothing"
    assert counters.num_groups > 0
    assert counts["num_compactions"] > 0
    assert counts["num_pruned_steps"] > 0
    assert counts["num_pages_freed"] > 0
    with ray_cluster(num_nodes=2) as cluster:
        settings = {"model": tiny_llama, "policy": POLICY, "load": LOAD}
        found = cluster.run_json(ROOT / "tests/ray_driver.py", settings, timeout=250)
    assert found["tokens"] == expected
    assert found["workers"] == [counts, counts]
    assert found["pages_freed"] == counters.num_pages_freed
    assert len({place["node"] for place in found["places"]}) == 2
    assert all(place["actor"] for place in found["places"])
    assert {place["platform"] for place in found["places"]} == {"RayCpuPlatform"}
    assert found["device_key"] == "", "the driver's platform is as it was"


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_ray_starts_two_engines_that_both_evict(tiny_llama: str) -> None:
    """Data parallelism on CPUs works with the platform that the nodes' variable asks
    for."""
    lengths = [300, 290, 280, 270]
    llm = make_llm(tiny_llama, kv_policy="pyramid")
    expected = [g.tokens for g in generate(llm, random_prompts(lengths), 16)]
    compacted = worker_of(llm).kv_policy_stats()["num_compactions"]
    close(llm)
    engine = DEFAULTS | {
        "model": tiny_llama,
        "additional_config": {"kv_policy": "pyramid"},
        "data_parallel_size": 2,
        "data_parallel_size_local": 1,
        "data_parallel_backend": "ray",
    }
    settings = {"engine": engine, "lengths": lengths, "max_tokens": 16}
    with ray_cluster(num_nodes=2, env={platform.VARIABLE: "1"}) as cluster:
        found = cluster.run_json(ROOT / "tests/ray_replicas.py", settings, timeout=350)
    assert found["tokens"] == expected
    workers = [worker for (worker,) in found["workers"]]
    assert len(workers) == 2
    for worker in workers:
        assert worker["num_compactions"] > 0
        assert worker["num_pages_freed"] > 0
    assert sum(worker["num_compactions"] for worker in workers) == compacted == 4


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_server_on_two_nodes(tiny_llama: str, tmp_path: Path) -> None:
    """`vllm serve` with the executor by name, as scripts/ray/cluster.md has it."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    save_tokenizer(model, 512)
    prompt = random_prompts([300])[0]
    llm = make_llm(str(model), kv_policy="pyramid", enable_prefix_caching=True)
    expected = generate(llm, [prompt], 16)[0].tokens
    close(llm)
    command = [str(VLLM), "serve", str(model), "--kv-policy", "pyramid"]
    command += ["--distributed-executor-backend", "pyramid_vllm.ray.CPURayExecutor"]
    command += ["--tensor-parallel-size", "2", "--host", "127.0.0.1", "--port", "8000"]
    command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    command += ["--max-model-len", "1024", "--kv-cache-memory-bytes", "16777216"]
    body = {"model": str(model), "prompt": prompt, "max_tokens": 16, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    question = {"url": "http://127.0.0.1:8000", "path": "/v1/completions", "body": body}
    log = tmp_path / "log"
    with ray_cluster(num_nodes=2) as cluster, log.open("wb") as output:
        cluster.popen(command, stdout=output, stderr=subprocess.STDOUT)
        answer = cluster.run_json(ROOT / "tests/ray_client.py", question, timeout=400)
    assert answer["choices"][0]["token_ids"] == expected
    assert "1 compactions" in log.read_text(errors="replace")


class PastTheWorker(UniProcExecutor):
    """Gives steps to the runner, as vLLM's older Ray executor does."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        return self.collective_rpc(
            lambda worker: worker.model_runner.execute_model(scheduler_output),
            non_block=non_block,
            single_value=True,
        )


def test_steps_past_the_worker_are_an_error(tiny_llama: str) -> None:
    """No token of a step is given out if the step did not run by its plan."""
    prompts = random_prompts([200])
    llm = make_llm(tiny_llama, distributed_executor_backend=PastTheWorker)
    assert len(generate(llm, prompts, 4)[0].tokens) == 4, "the executor itself works"
    close(llm)
    llm = make_llm(
        tiny_llama, kv_policy="pyramid", distributed_executor_backend=PastTheWorker
    )
    with pytest.raises(RuntimeError, match="past the worker"):
        generate(llm, prompts, 4)
    assert worker_of(llm).kv_policy_stats()["num_plans"] == 0
    close(llm)


class OwnLegacy(RayDistributedExecutor):
    """A subclass of vLLM's older Ray executor."""


@pytest.mark.parametrize(
    "backend", [RayDistributedExecutor, OwnLegacy, LEGACY_RAY_EXECUTOR]
)
def test_the_older_executor_is_refused_however_it_is_named(
    tiny_llama: str, backend: Any
) -> None:
    with pytest.raises(KVPolicyError, match=r"distributed_executor_backend=.*Ray"):
        engine_config(
            tiny_llama, kv_policy="pyramid", distributed_executor_backend=backend
        )
    engine_config(tiny_llama, distributed_executor_backend=backend)


@pytest.mark.parametrize(
    "backend", [executor.CPURayExecutor, "pyramid_vllm.ray.CPURayExecutor", "ray"]
)
def test_the_newer_executors_are_let_in(tiny_llama: str, backend: Any) -> None:
    config = engine_config(
        tiny_llama, kv_policy="pyramid", distributed_executor_backend=backend
    )
    assert config.parallel_config.distributed_executor_backend == backend


def make_executor(world_size: int) -> executor.CPURayExecutor:
    """An executor that has not started."""
    made = executor.CPURayExecutor.__new__(executor.CPURayExecutor)
    made.parallel_config = SimpleNamespace(
        world_size=world_size, placement_group=None, ray_runtime_env=None
    )
    return made


def test_a_cluster_with_too_few_places_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The refusal comes at once and says what to do; vLLM would wait for half an
    hour."""
    monkeypatch.setattr(executor.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(executor.ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(executor.ray.util, "get_current_placement_group", lambda: None)
    with pytest.raises(ValueError, match=r"of 2 workers.*cluster has 0: .*--num-gpus"):
        make_executor(2)._init_executor()
    assert current_platform.ray_device_key == ""


def test_no_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none(address: str, **settings: Any) -> None:
        assert address == "auto"
        raise ConnectionError

    monkeypatch.setattr(executor.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(executor.ray, "init", find_none)
    with pytest.raises(ValueError, match=r"no Ray cluster.*RAY_ADDRESS"):
        make_executor(1)._init_executor()


def test_the_executor_is_for_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False, raising=False)
    with pytest.raises(ValueError, match="valid there is 'ray'"):
        make_executor(1)._init_executor()


def test_the_platform_is_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(platform.VARIABLE, raising=False)
    assert platform.register() is None
    monkeypatch.setenv(platform.VARIABLE, "0")
    assert platform.register() is None
    monkeypatch.setenv(platform.VARIABLE, "1")
    assert platform.register() == "pyramid_vllm.ray.cpu_platform.RayCpuPlatform"
    monkeypatch.setenv(platform.VARIABLE, "yes")
    assert platform.register() is None
    monkeypatch.setenv(platform.VARIABLE, "1")
    monkeypatch.setattr("vllm.platforms.cpu_platform_plugin", lambda: None)
    assert platform.register() is None, "a vLLM for GPUs keeps its platform"


def test_importing_the_package_imports_neither_ray_nor_vllm() -> None:
    code = (
        "import sys, pyramid_vllm.ray.platform as p; p.register()\n"
        "print([m for m in ('ray', 'vllm', 'torch') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.strip() == "[]"
