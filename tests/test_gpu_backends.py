"""The policy in the attention backends and the model runner of GPUs, on a CPU.

Each case is a process of its own, in which vLLM's V2 runner and the package's kernels
are interpreted and torch stands in for the backends' attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from pyramid_vllm import resolve_policy
from pyramid_vllm.worker import PyramidGPUWorker
from tests.engines import (
    close,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
    worker_of,
)
from tests.gpu_on_cpu import run_in_process, use_backend, use_wrapped_backend

#: One of them ends in a chunk of a single token, beside others that generate.
PROMPTS = random_prompts([60, 129, 333], seed=3)
NUM_TOKENS = 34
SETTINGS: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 8}
#: Prunes rows, compacts prompts and compresses what is generated.
PYRAMIDINFER = {
    "base": "pyramidinfer",
    "prefill_decay_ratio": 0.3,
    "min_context_length": 8,
    "recent": 4,
    "exceed_length_to_compress": 8,
}
PYRAMID = {
    "base": "pyramid",
    "tiers": 3,
    "recent": 24,
    "min_context": 40,
    "retention": 0.4,
}
POLICIES = {"pyramidinfer": PYRAMIDINFER, "pyramid": PYRAMID}


def _engine(model: str, policy: Any, **settings: Any) -> Any:
    return make_llm(model, kv_policy=policy, **(SETTINGS | settings))


def _tokens(llm: Any) -> list[list[int]]:
    return [g.tokens for g in generate(llm, PROMPTS, NUM_TOKENS, logprobs=None)]


def _activity(llm: Any) -> dict[str, int]:
    counters, worker = scheduler_of(llm).kv_counters, worker_of(llm)
    return {
        "compactions": counters.num_compactions,
        "groups": counters.num_groups,
        "pages": counters.num_pages_freed,
        "pruned": worker.tier_state.counters.num_pruned_steps,
    }


@pytest.fixture(scope="module")
def by_v1(tiny_llama: str) -> dict[str, list[list[int]]]:
    """Tokens by the V1 runner, the CPU's own attention and torch references."""
    tokens = {}
    for name, policy in POLICIES.items():
        llm = _engine(tiny_llama, policy)
        tokens[name] = _tokens(llm)
        close(llm)
    return tokens


def run_backend(
    model: str, backend: str, layout: str, policies: list[str]
) -> dict[str, Any]:
    """Run some policies with a wrapped backend; this runs in a process of its own."""
    import os

    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    if layout:
        os.environ["VLLM_KV_CACHE_LAYOUT"] = layout
    use_wrapped_backend(backend)
    results: dict[str, Any] = {}
    for name in policies:
        llm = _engine(model, POLICIES[name])
        worker = worker_of(llm)
        assert isinstance(worker.model_runner, GPUModelRunner)
        impl = worker.compilation_config.static_forward_context[
            "model.layers.0.self_attn.attn"
        ].impl
        results[name] = {
            "tokens": _tokens(llm),
            "impl": type(impl).__name__,
            "kernels": worker.tier_state.step.kernels.__name__,
            "strides": list(worker.tier_layers[0].cache.key.stride()),
        } | _activity(llm)
        close(llm)
    return results


@pytest.mark.parametrize(
    ("backend", "layout", "policies"),
    [
        ("TRITON_ATTN", "NHD", ["pyramidinfer", "pyramid"]),
        ("FLASH_ATTN", "", ["pyramidinfer"]),
        ("FLASHINFER", "HND", ["pyramidinfer"]),
        pytest.param("TRITON_ATTN", "HND", ["pyramid"], marks=pytest.mark.slow),
        pytest.param("FLASH_ATTN", "HND", ["pyramid"], marks=pytest.mark.slow),
        pytest.param("FLASHINFER", "NHD", ["pyramid"], marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_cpu(
    tiny_llama: str,
    by_v1: dict[str, list[list[int]]],
    backend: str,
    layout: str,
    policies: list[str],
) -> None:
    """This holds for every runner, attention, layout and kernel set."""
    results = run_in_process(
        "tests.test_gpu_backends:run_backend",
        {
            "model": tiny_llama,
            "backend": backend,
            "layout": layout,
            "policies": policies,
        },
        timeout=400,
    )
    assert list(results) == policies
    for name, result in results.items():
        assert result["tokens"] == by_v1[name]
        assert result["kernels"] == "pyramid_vllm.kernels.on_triton"
        assert result["compactions"] >= len(PROMPTS)
        assert result["pages"] > 0
        is_pyramidinfer = name == "pyramidinfer"
        assert (result["groups"] > 0) == is_pyramidinfer
        assert (result["pruned"] > 0) == is_pyramidinfer
        heads_outside = result["strides"][1] > result["strides"][2]
        assert heads_outside == (layout == "HND")
    impls = {"TRITON_ATTN": "Triton", "FLASH_ATTN": "Flash", "FLASHINFER": "FlashInfer"}
    assert {r["impl"] for r in results.values()} == {f"Pyramid{impls[backend]}Impl"}


@contextmanager
def _as_captured(llm: Any) -> Iterator[None]:
    """Hide a step's plan: a replay runs no Python and sees nothing of it."""
    step = worker_of(llm).tier_state.step
    plan, step._plan = step._plan, None
    yield
    step._plan = plan


def run_graphs(model: str, backend: str) -> dict[str, Any]:
    """Run decode steps as captured graphs; this runs in a process of its own."""
    from tests.gpu_on_cpu_graphs import Graph, use_full_graphs
    from tests.gpu_on_cpu_kernels import CALLS

    use_wrapped_backend(backend)
    use_full_graphs()
    llm = _engine(model, PYRAMIDINFER)
    Graph.around = staticmethod(lambda: _as_captured(llm))
    CALLS.clear()
    result = {"tokens": _tokens(llm), "replays": CALLS["replay"]} | _activity(llm)
    worker = worker_of(llm)
    groups = worker.model_runner.attn_groups
    builders = [g.get_metadata_builder() for part in groups for g in part]
    result["support"] = sorted(
        {
            b.get_cudagraph_support(worker.vllm_config, b.kv_cache_spec).name
            for b in builders
        }
        if backend == "TRITON_ATTN"
        else {"not asked"}
    )
    if backend == "FLASHINFER":
        result["wrappers"], result["workspaces"] = zip(
            *map(_wrappers, builders), strict=True
        )
    if backend == "TRITON_ATTN":
        result["faults"] = [_fault_of_windows(llm)]
        close(llm)
        llm = _engine(model, PYRAMIDINFER)
        result["faults"].append(_fault_of_queries(llm))
    return result


def _wrappers(builder: Any) -> tuple[int, int]:
    """Wrappers for captured graphs, and workspaces for their plans."""
    wrappers = builder._decode_wrappers_cudagraph.values()
    workspaces = {id(wrapper._int_workspace_buffer) for wrapper in wrappers}
    return len(wrappers), len(workspaces)


def _fault_of_windows(llm: Any) -> str:
    """The error of a step whose windows were replayed instead of handled."""
    adapter = worker_of(llm).adapter
    cls = type(adapter)
    kept, cls._needs_python = cls._needs_python, False
    try:
        generate(llm, random_prompts([129], seed=4), 4, logprobs=None)
    except Exception as error:
        return str(error)
    finally:
        cls._needs_python = kept
    return "none"


def _fault_of_queries(llm: Any) -> str:
    """The error about queries that a graph did not copy."""
    from pyramid_vllm.worker.generated import GeneratedQueries

    GeneratedQueries.write = lambda *_: None  # type: ignore[method-assign]
    try:
        _tokens(llm)
    except Exception as error:
        return str(error)
    return "none"


@pytest.mark.parametrize(
    "backend",
    [
        "TRITON_ATTN",
        "FLASHINFER",
        pytest.param("FLASH_ATTN", marks=pytest.mark.slow),
    ],
)
def test_decode_steps_stay_in_graphs(
    tiny_llama: str, by_v1: dict[str, list[list[int]]], backend: str
) -> None:
    """Tokens are the same. A step that should have compacted and did not is an
    error."""
    result = run_in_process(
        "tests.test_gpu_backends:run_graphs",
        {"model": tiny_llama, "backend": backend},
        timeout=400,
    )
    assert result["tokens"] == by_v1["pyramidinfer"]
    # All but those that compute a prompt, the chunk of one token included.
    assert result["replays"] >= NUM_TOKENS - 2
    assert result["groups"] > 0
    if backend == "FLASHINFER":
        # Each takes 8 MiB on a GPU: one a tier, not one a tier and graph size.
        assert min(result["wrappers"]) > 1
        assert set(result["workspaces"]) == {1}
    if backend == "TRITON_ATTN":
        assert result["support"] == ["UNIFORM_BATCH"]
        windows, queries = result["faults"]
        assert "of 6 layers compacted" in windows
        assert "were not copied by the steps" in queries


def run_float8(model: str) -> dict[str, Any]:
    """Run caches of eight-bit floats, stock and with a policy; this runs in a process
    of its own."""
    use_backend("TRITON_ATTN")
    llm = make_llm(model, kv_cache_dtype="fp8", **SETTINGS)
    results: dict[str, Any] = {"stock": _tokens(llm)}
    close(llm)
    use_wrapped_backend("TRITON_ATTN")
    for name, retention, chunk in (
        ("all", 1.0, 128),
        ("some", 0.4, 128),
        ("some at once", 0.4, 1024),
    ):
        policy = {
            "base": "pyramid-by-depth", "retention": retention, "recent": 24,
            "min_context": 40, "tiers": 3,
        }  # fmt: skip
        llm = _engine(model, policy, kv_cache_dtype="fp8", max_num_batched_tokens=chunk)
        layer = worker_of(llm).tier_layers[0]
        results[name] = {
            "tokens": _tokens(llm),
            "dtype": str(layer.cache.key.dtype),
        } | _activity(llm)
        close(llm)
    return results


def test_float8_caches(tiny_llama: str) -> None:
    """Tokens are stock's where all is kept. However a prompt is cut, the same tokens
    stay."""
    results = run_in_process(
        "tests.test_gpu_backends:run_float8", {"model": tiny_llama}, timeout=400
    )
    assert results["all"]["tokens"] == results["stock"]
    assert results["all"]["compactions"] == 0
    assert results["some"]["tokens"] != results["stock"]
    assert results["some"]["compactions"] == len(PROMPTS)
    assert results["some"]["dtype"] == "torch.float8_e4m3fn"
    # Bytes are moved and scored as the floats that they stand for.
    assert results["some"]["tokens"] == results["some at once"]["tokens"]


def test_the_gpu_worker_sets_its_buffers_aside() -> None:
    """For Llama-3-8B's shape these are scores, and queries of a prompt that is cut."""
    worker = PyramidGPUWorker.__new__(PyramidGPUWorker)
    worker.kv_policy = resolve_policy("pyramid-by-depth", {"queries": 256, "tiers": 4})
    worker.parallel_config = None
    worker.scheduler_config = SimpleNamespace(
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        max_num_scheduled_tokens=None,
        long_prefill_token_threshold=0,
        enable_chunked_prefill=True,
    )
    worker.model_config = SimpleNamespace(
        max_model_len=8192,
        dtype=torch.bfloat16,
        hf_text_config=LlamaConfig(num_hidden_layers=32),
        get_num_kv_heads=lambda _: 8,
        get_num_attention_heads=lambda _: 32,
        get_head_size=lambda: 128,
    )
    worker.vllm_config = SimpleNamespace(
        model_config=worker.model_config,
        scheduler_config=worker.scheduler_config,
        cache_config=SimpleNamespace(enable_prefix_caching=False),
    )
    # A prompt that is cut ends and another one begins, in each layer and in one more
    # twice.
    queries = 2 * (32 + 2) * 256 * 32 * 128 * 2
    # Four groups of eight layers, pooled scores and indices; means and rows.
    scores = 4 * 16384 * ((4 + 2) * 8 * 8 + 2 * 8 + 1)
    normalizers = 2 * 4 * (1 << 23)
    buffers = worker.own_buffers()
    assert [b.num_bytes for b in buffers] == [queries, scores, 0, normalizers]
