"""A plan needs a configuration and integers: no engine, no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import profile_weights
from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.model_config import (
    FileConfig,
    bundled_shape,
    read_config,
    shape_names,
)

TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

#: Settings laid over ``TINY`` -> files that say it all.
COMPLETE: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "torch_dtype": "float16"},
    "llama-null-head": {"model_type": "llama", "head_dim": None, "dtype": "float32"},
    "two-dtypes": {
        "model_type": "llama",
        "dtype": "float32",
        "torch_dtype": "bfloat16",
    },
    "qwen2": {
        "model_type": "qwen2",
        "sliding_window": 64,
        "use_sliding_window": False,
        "max_window_layers": 2,
    },
    "qwen2-layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "layer_types": ALTERNATING,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "use_sliding_window": False},
    "qwen3-moe": {"model_type": "qwen3_moe", "use_sliding_window": False},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mixtral": {"model_type": "mixtral", "sliding_window": None},
    "smollm3": {
        "model_type": "smollm3",
        "pad_token_id": 0,
        "use_sliding_window": False,
    },
    "gpt-oss": {"model_type": "gpt_oss", "head_dim": 32, "layer_types": ALTERNATING},
}

#: Settings laid over ``TINY``, where None takes one out -> files whose answer depends
#: on a class of transformers.
INCOMPLETE: dict[str, dict[str, Any]] = {
    "llama-heads": {"model_type": "llama", "num_key_value_heads": None},
    "llama-length": {"model_type": "llama", "max_position_embeddings": None},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 2,
    },
    "qwen2-window-alone": {"model_type": "qwen2", "sliding_window": 64},
    "qwen3-head": {"model_type": "qwen3", "use_sliding_window": False},
    "mistral-window": {"model_type": "mistral", "sliding_window": 64},
    "mistral-default-window": {"model_type": "mistral"},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "layer_types": ALTERNATING},
    "gpt-oss-layers": {"model_type": "gpt_oss", "head_dim": 32},
    "mistral-layers": {"model_type": "mistral", "layer_types": ALTERNATING},
    "dtype-alias": {"model_type": "llama", "dtype": "half"},
    "olmo": {"model_type": "olmo"},
    "composite": {
        "model_type": "gemma3",
        "text_config": {**TINY, "model_type": "gemma3_text", "head_dim": 32},
    },
}


def write(folder: Path, settings: dict[str, Any]) -> str:
    """A model's folder with ``TINY`` under the settings."""
    merged = {**TINY, **settings}
    taken = {name for name in TINY if merged[name] is None}
    kept = {name: value for name, value in merged.items() if name not in taken}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(kept))
    return str(folder)


def assert_as_transformers_reads_it(folder: str) -> None:
    ours, theirs = read_config(folder), AutoConfig.from_pretrained(folder)
    assert ModelShape.of(ours) == ModelShape.of(theirs)
    text, their_text = ours.get_text_config(), theirs.get_text_config()
    assert profile_weights(text) == profile_weights(their_text)


@pytest.mark.parametrize("name", COMPLETE)
def test_a_file_that_says_it_all_is_read_alone(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, COMPLETE[name])
    assert isinstance(read_config(folder), FileConfig)
    assert_as_transformers_reads_it(folder)


@pytest.mark.parametrize("name", INCOMPLETE)
def test_transformers_completes_other_files(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, INCOMPLETE[name])
    assert not isinstance(read_config(folder), FileConfig)
    assert_as_transformers_reads_it(folder)


def test_names_of_old_files_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_layer": 3, "n_head": 4, "n_embd": 64})
    )
    assert ModelShape.of(read_config(str(tmp_path))).num_layers == 3


@pytest.mark.parametrize("name", shape_names())
def test_bundled_shapes_need_no_transformers(name: str) -> None:
    folder = bundled_shape(name.upper())
    assert folder is not None
    assert isinstance(read_config(name.lower()), FileConfig)
    assert_as_transformers_reads_it(str(folder))


def test_the_shapes_are_shipped() -> None:
    assert {"Llama-3-8B", "Qwen3-8B", "gpt-oss-20b"} <= set(shape_names())
    assert bundled_shape("../policies") is None


def test_a_shape_is_known_by_the_profile_of_its_model() -> None:
    config = read_config("SmolLM2-135M")
    weights = profile_weights(config.get_text_config())
    assert weights is not None
    assert len(weights) == config.num_hidden_layers


def imported_by_plan(model: str, **env: str) -> str:
    """Run ``plan`` in its own process; the heavy packages that it imported."""
    script = (
        "import sys\n"
        "from pyramid_vllm.tools.cli import app\n"
        "app(['plan', sys.argv[1], '--kv-policy', 'pyramid'], standalone_mode=False)\n"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
        "print('imported:', *sorted(heavy))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, model],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "requests at once" in result.stdout
    return result.stdout.splitlines()[-1].removeprefix("imported:").strip()


def test_plan_imports_no_engine(tmp_path: Path) -> None:
    assert imported_by_plan(write(tmp_path, COMPLETE["llama"])) == ""
    assert imported_by_plan("llama-3-8b") == ""


def test_plan_reads_the_local_hub_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--some--model"
    write(repository / "snapshots" / "abc", COMPLETE["llama"])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    env = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert imported_by_plan("some/model", **env) == ""


def test_the_check_sees_an_import(tmp_path: Path) -> None:
    """A file that transformers has to complete imports transformers."""
    assert imported_by_plan(write(tmp_path, INCOMPLETE["qwen3-head"])) != ""


@pytest.mark.parametrize("model", ["Lama-3-8B", "some/model", "/no/such/folder"])
def test_an_unknown_model_names_what_is_valid(model: str) -> None:
    result = CliRunner().invoke(app, ["plan", model])
    assert result.exit_code == 2
    words = " ".join(result.stderr.split())
    for word in (f"model is '{model}'", "config.json", "Llama-3-8B", "hub name"):
        assert word in words


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is not JSON"), ("[]", "holds list")]
)
def test_a_broken_file_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_config(str(tmp_path))


def test_help_names_the_shapes() -> None:
    result = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"})
    assert "bundled shape" in " ".join(result.stdout.split())
