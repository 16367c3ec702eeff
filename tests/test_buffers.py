"""Buffers of prompts and of generated tokens are bounded, and counted at start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyramid_vllm.limits import PromptLimits
from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.spec import required_policy
from pyramid_vllm.worker.gpu import PyramidGPUWorker
from tests.scheduling import make_config

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Triton's compiler runs on Linux alone"
)

THRESHOLD = {
    "long_prefill_token_threshold": 128,
    "max_num_batched_tokens": 2048,
    "max_model_len": 4096,
    "max_num_seqs": 64,
}
SHARED = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 1024,
    "max_model_len": 8192,
}
LONG = [(2000, 2, 0)] * 40
GENERATED = {
    "base": "pyramid", "recent": 16, "exceed_length_to_compress": 16,
}  # fmt: skip
SHORT = {"max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 64}

#: Runs by name, with what they would use more of without a limit.
RUNS: dict[str, dict[str, Any]] = {
    "many long prompts": {"settings": THRESHOLD, "requests": LONG},
    "scores that add up": {
        "policy": {"base": "h2o"},
        "settings": THRESHOLD,
        "requests": LONG,
    },
    "shared prefixes": {
        "policy": {"base": "streaming", "hit_split": "ignore"},
        "settings": SHARED,
        "requests": [(6000, 2, 5980)] * 24,
    },
    "chunks that end early": {
        "settings": THRESHOLD | {"max_num_batched_tokens": 256},
        "requests": LONG[:20],
        "cut": 32,
    },
    "generated tokens": {
        "policy": GENERATED,
        "settings": SHORT | {"max_num_batched_tokens": 1024},
        "requests": [(20, 80, 0)] * 60,
    },
    "replays": {
        "policy": {"base": "pyramidinfer"},
        "settings": SHORT,
        "requests": [(400, 90, 0)] * 30,
        "num_blocks": 500,
    },
}
FAULTS = {
    "shared prefixes": ("limits", "tokens"),
    "chunks that end early": ("limits", "requests"),
    "generated tokens": ("parts", "scores"),
}


def recorded(name: str, arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``tests.recorded_runs`` finds; its process interprets nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.recorded_runs", name, json.dumps(arguments)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def runs(tiny_llama: str) -> dict[str, dict[str, Any]]:
    """Each run, and again with a limit taken out."""
    base = {"model": tiny_llama, "policy": {"base": "pyramid"}}
    wanted = {name: base | run for name, run in RUNS.items()}
    for name, (fault, _) in FAULTS.items():
        wanted[f"{name}, {fault} out"] = wanted[name] | {"fault": fault}
    return dict(zip(wanted, recorded("memory", list(wanted.values())), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_what_buffers_hold_was_counted(
    name: str, runs: dict[str, dict[str, Any]]
) -> None:
    peaks, counted = runs[name]["peaks"], runs[name]["counted"]
    for what, peak in peaks.items():
        assert peak <= counted[what], what


@pytest.mark.parametrize("name", FAULTS)
def test_without_the_limit_they_would_hold_more(
    name: str, runs: dict[str, dict[str, Any]]
) -> None:
    fault, what = FAULTS[name]
    run = runs[f"{name}, {fault} out"]
    assert run["peaks"][what] > run["counted"][what]


def test_as_many_prompts_are_cut_as_the_scheduler_can_cut(
    runs: dict[str, dict[str, Any]],
) -> None:
    """No fewer: the limit takes nothing from vLLM's own scheduling."""
    run = runs["many long prompts"]
    assert run["max_cut"] == 2048 // 128
    assert run["peaks"]["requests"] >= run["max_cut"]


@pytest.mark.parametrize(
    ("settings", "max_cut", "max_at_once"),
    [
        ({}, 1, 2),
        ({"long_prefill_token_threshold": 128}, 16, 32),
        ({"long_prefill_token_threshold": 100}, 21, 40),
        ({"long_prefill_token_threshold": 20}, 40, 40),
        ({"max_num_scheduled_tokens": 512, "long_prefill_token_threshold": 128}, 4, 8),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}, 1, 2),
    ],
)
def test_prompts_in_the_middle_of_being_computed(
    settings: dict[str, int], max_cut: int, max_at_once: int
) -> None:
    defaults = {
        "max_num_seqs": 40,
        "max_num_batched_tokens": 2048,
        "max_num_scheduled_tokens": None,
        "long_prefill_token_threshold": 0,
    }
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(**(defaults | settings)),
        model_config=SimpleNamespace(max_model_len=4096),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
    )
    limits = PromptLimits.of(config)
    assert (limits.max_cut, limits.max_at_once) == (max_cut, max_at_once)


@pytest.mark.parametrize(
    ("settings", "policy", "names"),
    [
        (
            THRESHOLD | {"max_num_batched_tokens": 8192, "max_num_seqs": 256},
            {"base": "pyramid"},
            "256.*max_num_batched_tokens=8192, long_prefill_token_threshold=128, "
            "max_model_len=4096",
        ),
        (
            SHORT | {"max_num_seqs": 1024, "max_num_batched_tokens": 1024},
            GENERATED | {"gen_queries": 64},
            "max_num_seqs=1024, gen_queries=64",
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_start(
    settings: dict[str, Any],
    policy: dict[str, Any],
    names: str,
    tiny_llama: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = PyramidGPUWorker.__new__(PyramidGPUWorker)
    worker.vllm_config = config = make_config(tiny_llama, policy, **settings)
    worker.kv_policy = required_policy(config)
    worker.model_config = config.model_config
    worker.parallel_config = config.parallel_config
    worker.scheduler_config = config.scheduler_config
    available = sum(buffer.num_bytes for buffer in worker.own_buffers())
    stock = "vllm.v1.worker.gpu_worker.Worker.determine_available_memory"
    monkeypatch.setattr(stock, lambda _: available)
    with pytest.raises(KVPolicyError, match=f"{names}.*lower max_num_seqs"):
        worker.determine_available_memory()
    monkeypatch.setattr(stock, lambda _: available + 1)
    assert worker.determine_available_memory() == 1
