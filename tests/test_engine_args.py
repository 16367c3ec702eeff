"""The ways to turn a policy on, and what is refused before a model loads."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV2Config,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname

import pyramid_vllm  # noqa: F401
from pyramid_vllm.checks import check_engine
from pyramid_vllm.engine_args import (
    SCHEDULER_CLS,
    WORKER_CLS,
    _worker_cls,
    install,
)
from pyramid_vllm.policy import KVPolicyError, preset_dir
from tests.models import TINY_LLAMA, save_config


def engine_config(model: str, **settings: Any) -> Any:
    """What vLLM makes of the arguments; no weights are touched."""
    defaults = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256}
    return EngineArgs(model=model, **(defaults | settings)).create_engine_config()


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama without weights: an engine that tried to load it would fail."""
    config = LlamaConfig(**TINY_LLAMA, architectures=["LlamaForCausalLM"])
    return save_config(tmp_path_factory.mktemp("llama"), config)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_policy": "pyramid"},
        {"additional_config": {"kv_policy": "pyramid"}},
        {"kv_policy": {"name": "pyramid"}},
        {"kv_policy": str(preset_dir() / "pyramid.yaml")},
        {
            "additional_config": {"kv_policy": "pyramid"},
            "scheduler_cls": SCHEDULER_CLS,
            "worker_cls": WORKER_CLS["cpu"],
        },
    ],
)
def test_every_way_in_chooses_our_classes(
    config_only: str, settings: dict[str, Any]
) -> None:
    config = engine_config(config_only, **settings)
    assert config.scheduler_config.scheduler_cls == SCHEDULER_CLS
    assert config.parallel_config.worker_cls == WORKER_CLS["cpu"]
    assert config.additional_config["kv_policy"]["name"] == "pyramid"
    assert config.cache_config.enable_prefix_caching is True


@pytest.mark.parametrize("policy", [None, "none"])
def test_without_a_policy_vllm_is_as_if_we_were_not_there(
    config_only: str, policy: str | None
) -> None:
    config = engine_config(config_only, kv_policy=policy)
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.cache_config.enable_prefix_caching is True


def test_overrides_reach_the_engine(config_only: str) -> None:
    config = engine_config(
        config_only, kv_policy="pyramid", kv_policy_config='{"retention": 0.25}'
    )
    assert config.additional_config["kv_policy"]["retention"] == 0.25
    assert "kv_policy_config" not in config.additional_config


def test_installing_twice_wraps_once() -> None:
    before = EngineArgs.create_engine_config
    install()
    assert EngineArgs.create_engine_config is before


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    namespace: argparse.Namespace = parser.parse_args(arguments)
    return namespace


def test_flags_become_arguments(config_only: str) -> None:
    args = parse(
        [
            f"--model={config_only}",
            "--kv-policy=uniform",
            '--kv-policy-config={"retention": 0.3}',
        ]
    )
    engine_args = AsyncEngineArgs.from_cli_args(args)
    assert engine_args.additional_config == {
        "kv_policy": "uniform",
        "kv_policy_config": '{"retention": 0.3}',
    }


def test_flags_have_a_group_of_their_own() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    (group,) = [g for g in parser._action_groups if g.title == "KVPolicy"]
    flags = [flag for action in group._group_actions for flag in action.option_strings]
    assert flags == ["--kv-policy", "--kv-policy-config"]


def test_importing_the_package_does_not_import_vllm() -> None:
    code = "import sys, pyramid_vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"kv_policy": "pyramyd"}, ["'pyramyd'", "none, pyramid"]),
    (
        {"kv_policy_config": {"retention": 2}},
        ["'retention' is 2", "less than or equal to 1"],
    ),
    ({"kv_policy_config": {"tiers": 7}}, ["'tiers' is 7", "1 to 6"]),
    ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size=2", "valid is 1"]),
    (
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
        ["decode_context_parallel_size=2", "valid is 1"],
    ),
    (
        {
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
            "kv_policy_config": {"exceed_length_to_compress": 8},
        },
        ["exceed_length_to_compress=8", "valid is none"],
    ),
    (
        {
            "kv_transfer_config": {
                "kv_connector": "ExampleConnector",
                "kv_role": "kv_both",
            }
        },
        ["kv_transfer_config='ExampleConnector'", "valid is none"],
    ),
    ({"scheduler_cls": "mine.Scheduler"}, ["scheduler_cls", "mine.Scheduler"]),
    ({"worker_cls": "mine.Worker"}, ["worker_cls", "mine.Worker"]),
    (
        {"additional_config": {"kv_policy": "uniform"}},
        ["'pyramid'", "'uniform'", "once"],
    ),
    (
        {"disable_hybrid_kv_cache_manager": True},
        ["disable_hybrid_kv_cache_manager=True"],
    ),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_unsupported_engines_are_refused(
    config_only: str, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(KVPolicyError) as error:
        engine_config(config_only, **({"kv_policy": "pyramid"} | settings))
    for word in words:
        assert word in str(error.value)


def mla_config() -> DeepseekV2Config:
    return DeepseekV2Config(
        num_hidden_layers=2, architectures=["DeepseekV2ForCausalLM"], n_routed_experts=4
    )


def mamba_config() -> MambaConfig:
    return MambaConfig(num_hidden_layers=2, architectures=["MambaForCausalLM"])


def hybrid_config() -> JambaConfig:
    return JambaConfig(num_hidden_layers=8, architectures=["JambaForCausalLM"])


def sliding_config() -> MistralConfig:
    return MistralConfig(
        num_hidden_layers=2, sliding_window=128, architectures=["MistralForCausalLM"]
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (mla_config(), ["MLA"]),
        (mamba_config(), ["full attention", "none"]),
        (sliding_config(), ["full attention", "none"]),
        (hybrid_config(), ["hybrid model"]),
    ],
    ids=["mla", "mamba", "sliding-window", "hybrid"],
)
def test_models_without_full_attention_are_refused(
    tmp_path: Path, config: Any, words: list[str]
) -> None:
    model = save_config(tmp_path, config)
    with pytest.raises(KVPolicyError) as error:
        engine_config(model, kv_policy="pyramid")
    for word in words:
        assert word in str(error.value)


def test_gpus_need_the_v2_runner(
    config_only: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(config_only, kv_policy="pyramid")
    monkeypatch.setattr(config.device_config, "device_type", "cuda")
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", False)
    with pytest.raises(KVPolicyError, match="V1 model runner on device='cuda'"):
        check_engine(config)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    check_engine(config)


def test_another_device_is_refused(
    config_only: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(config_only, kv_policy="pyramid")
    monkeypatch.setattr(config.device_config, "device_type", "xpu")
    with pytest.raises(KVPolicyError, match="device='xpu': valid are 'cpu' and 'cuda'"):
        check_engine(config)


def test_the_worker_is_that_of_the_device(
    config_only: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's platform decides this before there is a configuration."""
    from vllm.platforms import current_platform

    for device, name in WORKER_CLS.items():
        monkeypatch.setattr(type(current_platform), "device_type", device)
        assert _worker_cls() == name
        assert resolve_obj_by_qualname(name).__mro__[1].__name__ == "TieredWorker"
    monkeypatch.setattr(type(current_platform), "device_type", "xpu")
    with pytest.raises(KVPolicyError, match="device='xpu': valid are 'cpu', 'cuda'"):
        _worker_cls()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_unsupported_vllm_versions_are_refused(
    config_only: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyramid_vllm.compat.installed_vllm_version", lambda: version)
    with pytest.raises(KVPolicyError) as error:
        engine_config(config_only, kv_policy="pyramid")
    assert version in str(error.value)
    assert ">=0.32" in str(error.value)
    assert "<0.34" in str(error.value)
    engine_config(config_only)


def test_refusal_comes_before_the_weights(config_only: str) -> None:
    """The folder has no weights: an engine that got that far would say so."""
    from vllm import LLM

    with pytest.raises(KVPolicyError, match="'tiers' is 99"):
        LLM(model=config_only, skip_tokenizer_init=True, kv_policy={"tiers": 99})


def test_inline_json_on_the_command_line(config_only: str) -> None:
    policy = json.dumps({"base": "streaming", "recent": 16})
    args = AsyncEngineArgs.from_cli_args(
        parse(["--model", config_only, "--kv-policy", policy])
    )
    args.skip_tokenizer_init = True
    config = args.create_engine_config()
    resolved = config.additional_config["kv_policy"]
    assert (resolved["scorer"], resolved["recent"]) == ("recency", 16)
