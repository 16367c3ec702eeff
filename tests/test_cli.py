"""The command line, without an engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig
from typer.testing import CliRunner

from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.cli.demo import greedy_agreement
from pyramid_vllm.tools.cli.plan import PlanRequest, make_plan
from pyramid_vllm.tools.sizes import format_bytes, parse_bytes
from tests.models import TINY_LLAMA, save_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_config(tmp_path_factory.mktemp("model"), LlamaConfig(**TINY_LLAMA))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})


@pytest.mark.parametrize(
    ("text", "size"),
    [("80MiB", 80 * 2**20), ("1.5 GiB", 3 * 2**29), ("12345", 12345), ("2kib", 2048)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "80MB", "0"])
def test_bad_sizes_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="valid are bytes"):
        parse_bytes(text)


def test_sizes_are_written() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(45 * 2**20) == "45.0 MiB"
    assert format_bytes(3 * 2**30) == "3.00 GiB"


def test_agreement_counts_up_to_the_first_difference() -> None:
    ours = [[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 9, 4]]
    stock = [[1, 2, 3, 4]] * 3
    assert greedy_agreement(ours, stock) == pytest.approx((1 + 0 + 0.5) / 3)


def plan_request(model: str, **changes: Any) -> PlanRequest:
    settings: dict[str, Any] = {
        "model": model,
        "kv_policy": "pyramid",
        "kv_policy_config": None,
        "kv_memory": "64MiB",
        "max_model_len": 2048,
        "output_tokens": 48,
        "block_size": 32,
        "dtype": "float32",
    }
    return PlanRequest(**(settings | changes))


def test_the_plan_says_what_is_pruned(model: str) -> None:
    options = ("--kv-memory", "64MiB", "--max-model-len", "2000")
    pruned = run("plan", model, "--kv-policy", "pyramidinfer", *options)
    whole = run("plan", model, "--kv-policy", "pyramid", *options)
    assert "prompt rows computed a layer, mean" in pruned.stdout
    assert "rows computed" not in whole.stdout


def test_the_plan_is_arithmetic_on_the_model(model: str) -> None:
    memory, prompt = make_plan(plan_request(model))
    token_bytes = 2 * 2 * 32 * 4  # K and V, 2 heads of 32, float32
    assert prompt == 2000
    kept, layout = memory.rule.cache_lengths(prompt), memory.rule.layout
    assert abs(layout.mean(kept) - 800) <= 1
    pages = [-(-(count + 48) // 32) for count in kept]
    assert memory.stock_request_bytes(2048) == 64 * 32 * token_bytes * 6
    expected = sum(page * size for page, size in zip(pages, layout.sizes, strict=True))
    policy_bytes = memory.request_bytes(prompt, 48)
    assert policy_bytes >= expected * 32 * token_bytes
    assert layout.num_padding_layers or policy_bytes == expected * 32 * token_bytes
    count = memory.concurrency(64 * 2**20, prompt, 48)
    assert count / memory.stock_concurrency(64 * 2**20, 2048) > 1.5


def test_plan_prints_both_sides(model: str) -> None:
    result = run("plan", model, "--kv-memory", "64MiB", "--max-model-len", "2048")
    assert result.exit_code == 0
    for word in ("stock vLLM", "pyramid", "requests at once", "tokens kept a layer"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-policy", "pyramyd"], "valid policies are"),
        (["--kv-policy", "none"], "nothing to plan"),
        (["--kv-policy-config", '{"tiers": 7}'], "valid is 1 to 6"),
        (["--kv-memory", "lots"], "memory is 'lots'"),
        (["--dtype", "int3"], "dtype is 'int3'"),
        (["--max-model-len", "100"], "output_tokens is 128"),
    ],
)
def test_plan_names_what_is_wrong(model: str, arguments: list[str], words: str) -> None:
    result = run("plan", model, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_plan_refuses_a_model_without_full_attention(tmp_path: Path) -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=64)
    result = run("plan", save_config(tmp_path, config))
    assert result.exit_code == 2
    assert "this model has none" in " ".join(result.stderr.split())


def test_a_policy_file_is_taken(model: str, policy_file: Path) -> None:
    policy_file.write_text(json.dumps({"name": "mine", "retention": 0.2}))
    result = run("plan", model, "--kv-policy", str(policy_file))
    assert result.exit_code == 0
    assert "mine" in result.stdout
