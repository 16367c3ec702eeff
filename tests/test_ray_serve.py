"""Ray Serve: the files in `configs/ray` and `scripts/ray/serve.py`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from engines import engine_kwargs, find_device
from serve import make_config

from tests.engines import MIB, texts_of_policy_and_stock
from tests.models import TINY_LLAMA, save_tiny_llama
from tests.one_engine import save_tokenizer
from tests.ray_cluster import RayCluster, ray_cluster
from tests.ray_processes import kill_with_children, pid_of

ROOT = Path(__file__).resolve().parents[1]
SERVE = ROOT / "configs" / "ray" / "serve.yaml"
SERVE_COMMAND = str(Path(sys.executable).with_name("serve"))
KUBERAY = ROOT / "configs" / "ray" / "kuberay.yaml"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def engines_of(config: Any) -> list[dict[str, Any]]:
    """The ``LLMConfig`` of each engine in a Serve file."""
    return [
        engine
        for application in config["applications"]
        for engine in application["args"]["llm_configs"]
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama that chats."""
    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder, TINY_LLAMA["vocab_size"])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return save_tiny_llama(folder, TINY_LLAMA)


def test_every_engine_of_the_file_is_one_that_vllm_makes(model: str) -> None:
    """Ray's own checks, then vLLM's and the policy's pass, up to the engine itself."""
    from ray.serve.llm import LLMConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    found = engines_of(load(SERVE))
    assert found
    for engine in found:
        engine["model_loading_config"]["model_source"] = model
        arguments = LLMConfig(**engine).get_engine_config().get_initialization_kwargs()
        config = AsyncEngineArgs(**arguments).create_engine_config()
        assert config.scheduler_config.scheduler_cls.endswith("PyramidScheduler")
        given = engine["engine_kwargs"]["additional_config"]["kv_policy_config"]
        resolved = config.additional_config["kv_policy"]
        assert given.items() <= resolved.items()


def test_the_script_asks_for_what_a_device_has(model: str) -> None:
    """The script asks for a bundle for each tensor-parallel worker, with the policy
    on."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    for name, bundle in (("cpu", {"CPU": 1}), ("gpu", {"CPU": 1, "GPU": 1})):
        device = find_device(name)
        settings = engine_kwargs(device, "pyramid", '{"retention": 0.5}', None)
        settings["tensor_parallel_size"] = 2
        config = make_config("tiny", model, device, settings, 1).get_engine_config()
        assert config.placement_bundles == [bundle, bundle]
        arguments = config.get_initialization_kwargs() | {"tensor_parallel_size": 1}
        arguments["distributed_executor_backend"] = "mp"
        policy = AsyncEngineArgs(**arguments).create_engine_config().additional_config
        assert policy["kv_policy"]["retention"] == 0.5


def test_a_bad_policy_of_the_file_is_refused(model: str) -> None:
    from ray.serve.llm import LLMConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    from pyramid_vllm import KVPolicyError

    (engine,) = engines_of(load(SERVE))
    engine["model_loading_config"]["model_source"] = model
    engine["engine_kwargs"]["additional_config"]["kv_policy_config"] = {"retention": 7}
    arguments = LLMConfig(**engine).get_engine_config().get_initialization_kwargs()
    with pytest.raises(KVPolicyError, match="retention"):
        AsyncEngineArgs(**arguments).create_engine_config()


def test_the_policy_is_no_engine_argument_of_its_own_to_ray_serve() -> None:
    """What `configs/ray/serve.yaml` and the README say of `kv_policy`."""
    from ray.serve.llm import LLMConfig

    (engine,) = engines_of(load(SERVE))
    engine["engine_kwargs"]["kv_policy"] = "pyramid"
    with pytest.raises(ValueError, match="Unknown engine argument: kv_policy"):
        LLMConfig(**engine).get_engine_config()


def test_the_files_are_valid_to_ray_and_have_one_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    serve, kuberay = load(SERVE), load(KUBERAY)
    assert (kuberay["apiVersion"], kuberay["kind"]) == ("ray.io/v1", "RayService")
    embedded = yaml.safe_load(kuberay["spec"]["serveConfigV2"])
    assert embedded["applications"] == serve["applications"]
    assert ServeDeploySchema(**serve).http_options.host == "127.0.0.1"
    ServeDeploySchema(**embedded)
    cluster = kuberay["spec"]["rayClusterConfig"]
    assert {"headGroupSpec", "workerGroupSpecs", "rayVersion"} <= cluster.keys()


#: How Ray names the replica's process; then vLLM's processes below it.
REPLICA = "ray::ServeReplica:llm:LLMServer:smollm2"
START_UP_S = 240
MAX_TOKENS = 16
TEXT = "the sea was calm and gulls sat on the rocks while a boat came in " * 7


@dataclass
class Served:
    """A running application."""

    cluster: RayCluster

    def ask(self, max_retries: int = 2, start_up_s: float = 0.0) -> dict[str, Any]:
        """One chat, and what the workers have done since they started."""
        request = {
            "base_url": "http://127.0.0.1:8000/v1",
            "model": "smollm2",
            "prompt": TEXT,
            "max_tokens": MAX_TOKENS,
            "max_retries": max_retries,
            "start_up_s": start_up_s,
        }
        client = ROOT / "tests" / "ray_serve_client.py"
        found: dict[str, Any] = self.cluster.run_json(client, request, START_UP_S + 120)
        return found


def small_config(model: str) -> Any:
    """The file's content, for a model of six layers."""
    config = load(SERVE)
    (engine,) = engines_of(config)
    engine["model_loading_config"]["model_source"] = model
    engine["engine_kwargs"]["kv_cache_memory_bytes"] = 64 * MIB
    return config


@pytest.fixture(scope="module")
def served(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The application of `configs/ray/serve.yaml`, with another model."""
    folder = tmp_path_factory.mktemp("serve")
    config = small_config(model)
    (folder / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    log = folder / "log"
    environment = {"VLLM_LOGGING_LEVEL": "INFO"}
    with (
        ray_cluster(num_nodes=1, num_cpus=2, num_gpus=0, env=environment) as cluster,
        log.open("wb") as output,
    ):
        command = [SERVE_COMMAND, "run", str(folder / "serve.yaml")]
        cluster.popen(command, stdout=output, stderr=subprocess.STDOUT)
        running = Served(cluster)
        running.ask(start_up_s=START_UP_S)
        yield running


def alone(model: str) -> tuple[str, str]:
    """The answer of an engine of this process with the file's policy, and stock's."""
    (engine,) = engines_of(small_config(model))
    (ours,), (stock,) = texts_of_policy_and_stock(
        model, [TEXT], MAX_TOKENS, **engine["engine_kwargs"]
    )
    return ours, stock


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_chat_is_answered_on_the_policy(served: Served, model: str) -> None:
    """The workers themselves report that they evicted; the answer is the policy's."""
    result = served.ask()
    (stats,) = result["stats"]
    assert stats["num_plans"] > 0
    assert stats["num_compactions"] > 0
    assert stats["num_pages_freed"] > 0
    ours, stock = alone(model)
    assert result["answer"] == ours
    assert ours != stock, "the policy changes nothing here"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_replica_is_replaced(served: Served) -> None:
    """Another replica answers the next request, with the policy on as well."""
    before = served.ask()["answer"]
    killed = pid_of(served.cluster, REPLICA)
    kill_with_children(killed)
    result = served.ask(max_retries=12)
    assert result["answer"] == before
    assert pid_of(served.cluster, REPLICA) != killed
    (stats,) = result["stats"]
    assert stats["num_compactions"] > 0
