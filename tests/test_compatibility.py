"""The document of supported and refused features agrees with the code."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig
from vllm.config import VllmConfig

from pyramid_vllm.attention.cpu import CPUAccess
from pyramid_vllm.checks import LEGACY_RAY_EXECUTOR, check_engine
from pyramid_vllm.policy import KVPolicyError
from tests.documents import functions, read
from tests.models import TINY_LLAMA, save_config
from tests.test_engine_args import (
    engine_config,
    hybrid_config,
    mla_config,
    sliding_config,
)

DOCUMENT = read("docs/compatibility.md")


def section(title: str) -> str:
    """Text of the document from a heading to the next one."""
    start = DOCUMENT.index(f"## {title}")
    return DOCUMENT[start : DOCUMENT.index("\n## ", start)]


def refused_at_start() -> set[str]:
    """First column of the table, its code spans."""
    rows = re.findall(r"^\| (`.+?) \|", section("Refused at start"), flags=re.M)
    return {name for row in rows for name in re.findall(r"`(.+?)`", row)}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tests/.+?)`", DOCUMENT))))
def test_every_test_that_is_named_exists(path: str) -> None:
    file, _, name = path.partition("::")
    assert name in functions(file)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama without weights."""
    config = LlamaConfig(**TINY_LLAMA, architectures=["LlamaForCausalLM"])
    return save_config(tmp_path_factory.mktemp("llama"), config)


Refuse = Callable[[str, Path, pytest.MonkeyPatch], None]


def by_setting(**settings: Any) -> Refuse:
    """Settings that are refused when vLLM builds its configuration."""

    def refuse(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        engine_config(llama, **({"kv_policy": "pyramid"} | settings))

    return refuse


def by_model(make: Callable[[], Any], **settings: Any) -> Refuse:
    """Models whose configuration is refused."""

    def refuse(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        engine_config(save_config(folder, make()), kv_policy="pyramid", **settings)

    return refuse


def by_config(part: str, policy: Any = "pyramid", **values: Any) -> Refuse:
    """What is refused of the configuration that vLLM has made of its arguments, here or
    on other machines."""

    def refuse(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        config = engine_config(llama, kv_policy=policy)
        owner = getattr(config, part) if part else config
        for name, value in values.items():
            patch.setattr(
                owner if name in vars(owner) else type(owner),
                name,
                value,
                raising=False,
            )
        check_engine(config)

    return refuse


def by_version(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("pyramid_vllm.compat.installed_vllm_version", lambda: "0.34.0")
    engine_config(llama, kv_policy="pyramid")


def by_runner(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    config = engine_config(llama, kv_policy="pyramid")
    patch.setattr(config.device_config, "device_type", "cuda")
    patch.setattr(VllmConfig, "use_v2_model_runner", False)
    check_engine(config)


def by_scorer(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    config = engine_config(llama, kv_policy="pyramid")
    patch.setattr(config.device_config, "device_type", "cuda")
    patch.setattr(VllmConfig, "use_v2_model_runner", True)
    patch.setattr("pyramid_vllm.checks.SCORERS", {"recency": None})
    check_engine(config)


def by_drafts_on_v2(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    config = engine_config(llama, kv_policy="pyramid", speculative_config=NGRAM)
    patch.setattr(VllmConfig, "use_v2_model_runner", True)
    check_engine(config)


def by_ray(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    config = engine_config(llama, kv_policy="pyramid")
    patch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    patch.setattr(config.parallel_config, "distributed_executor_backend", "ray")
    check_engine(config)


def by_experts(**values: Any) -> Refuse:
    """Refused for a mixture of experts whose rows are pruned."""

    def refuse(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        config = engine_config(
            llama, kv_policy="pyramid", kv_policy_config={"prune_from": 0}
        )
        for name, value in values.items():
            patch.setattr(config.parallel_config, name, value)
        check_engine(config)
        patch.setattr(type(config.model_config), "is_moe", True)
        check_engine(config)

    return refuse


def by_hisparse(llama: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    config = engine_config(llama, kv_policy="pyramid")
    patch.setattr(VllmConfig, "use_v2_model_runner", False)  # it would ask for V2
    patch.setattr(config.attention_config, "hisparse_config", "set")
    check_engine(config)


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}

#: What the table says is refused, and how to meet it.
REFUSALS: dict[str, Refuse] = {
    "device": by_config("device_config", device_type="xpu"),
    "vLLM's V1 model runner on device": by_runner,
    "scorer": by_scorer,
    "speculative_config with vLLM's V2 model runner": by_drafts_on_v2,
    "vLLM": by_version,
    "pipeline_parallel_size": by_setting(pipeline_parallel_size=2),
    "decode_context_parallel_size": by_setting(
        tensor_parallel_size=4, decode_context_parallel_size=2
    ),
    "prefill_context_parallel_size": by_config(
        "parallel_config", prefill_context_parallel_size=2
    ),
    "enable_dbo": by_config("parallel_config", use_ubatching=True),
    "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": by_ray,
    "distributed_executor_backend": by_setting(
        distributed_executor_backend=LEGACY_RAY_EXECUTOR
    ),
    "speculative_config": by_config(
        "", speculative_config=SimpleNamespace(method="eagle")
    ),
    "speculative_config with exceed_length_to_compress": by_setting(
        speculative_config=NGRAM, kv_policy_config={"exceed_length_to_compress": 8}
    ),
    "speculative_config with evict": by_setting(
        speculative_config=NGRAM, kv_policy="segments", block_size=32
    ),
    "kv_transfer_config": by_setting(
        kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    ),
    "prefix_match_unit": by_setting(block_size=32, prefix_match_unit=16),
    "kv_sharing_fast_prefill": by_config("cache_config", kv_sharing_fast_prefill=True),
    "kv_cache_dtype": by_config("cache_config", cache_dtype="fp8"),
    "disable_hybrid_kv_cache_manager": by_setting(disable_hybrid_kv_cache_manager=True),
    "scheduler_reserve_full_isl": by_setting(scheduler_reserve_full_isl=False),
    "hisparse_config": by_hisparse,
    "enable_lora with prune_from": by_setting(
        enable_lora=True, kv_policy_config={"prune_from": 0}
    ),
    "data_parallel_size with prune_from": by_experts(data_parallel_size=2),
    "enable_expert_parallel with prune_from": by_experts(enable_expert_parallel=True),
    "scheduler_cls": by_setting(scheduler_cls="mine.Scheduler"),
    "worker_cls": by_setting(worker_cls="mine.Worker"),
    "additional_config": by_setting(additional_config={"kv_policy": "uniform"}),
    "MLA attention": by_model(mla_config),
    "runner": by_setting(runner="pooling"),
    "hybrid model": by_model(hybrid_config),
    "rswa_window": by_config("model_config", rswa_window=64),
    "encoder-decoder model": by_config("model_config", is_encoder_decoder=True),
    "attention in both directions to images": by_config(
        "model_config", is_mm_prefix_lm=True
    ),
    "layers with full attention": by_model(sliding_config),
}


def test_the_table_names_what_is_refused() -> None:
    assert refused_at_start() == set(REFUSALS)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_at_start(
    name: str, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refusal names the setting, before any weights are read: the folder has
    none."""
    with pytest.raises(KVPolicyError) as error:
        REFUSALS[name](llama, tmp_path, monkeypatch)
    assert name in str(error.value)


def test_no_refusal_is_missing_from_the_table() -> None:
    """The table has every setting that the checks name."""
    source = read("pyramid_vllm/checks.py")
    named = set()
    for node in ast.walk(ast.parse(source)):
        is_refusal = isinstance(node, ast.Call) and getattr(node.func, "id", "") == (
            "_refuse"
        )
        if is_refusal and isinstance(node.args[0], ast.Constant):  # type: ignore[attr-defined]
            named.add(node.args[0].value)  # type: ignore[attr-defined]
    assert len(named) > 12
    assert named <= refused_at_start()


def test_alibi_is_refused() -> None:
    impl = SimpleNamespace(alibi_slopes=[0.5])
    access = CPUAccess(SimpleNamespace(impl=impl))
    with pytest.raises(KVPolicyError, match="attention with alibi_slopes"):
        access.check_movable()
    impl.alibi_slopes = None
    access.check_movable()
