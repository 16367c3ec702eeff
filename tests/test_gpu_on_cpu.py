"""Stock vLLM gives the same tokens on a CPU as it does when it is set up as on a
GPU."""

import os
from typing import Any

import pytest
import torch

from tests import gpu_on_cpu_kernels as stand_ins
from tests.engines import (
    close,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
    start,
    worker_of,
)
from tests.gpu_on_cpu import run_in_process, use_backend
from tests.gpu_on_cpu_flashinfer import BatchDecodeWithPagedKVCacheWrapper
from tests.gpu_on_cpu_graphs import use_full_graphs
from tests.gpu_on_cpu_kernels import CALLS

LENGTHS = [5, 64, 129, 200]
NUM_TOKENS = 24
SETTINGS = {"max_num_batched_tokens": 128, "max_num_seqs": 16}
NUM_SLOTS, HEAD_SIZE = 192, 32
SCALES = torch.tensor(0.5), torch.tensor(0.25)
IMPLS = {
    "TRITON_ATTN": "TritonAttentionImpl",
    "FLASH_ATTN": "FlashAttentionImpl",
    "FLASHINFER": "FlashInferImpl",
}
KERNELS = {
    "TRITON_ATTN": {"unified_attention", "write"},
    "FLASH_ATTN": {"flash_attn_varlen_func", "write"},
    "FLASHINFER": {
        "prefill_plan",
        "decode_plan",
        "BatchPrefillWithPagedKVCacheWrapper.run",
        "BatchDecodeWithPagedKVCacheWrapper.run",
        "write",
    },
}


def _engine(model: str, **settings: Any) -> Any:
    return make_llm(model, **(SETTINGS | settings))


def _layer(llm: Any) -> Any:
    """The first layer's attention."""
    config = worker_of(llm).vllm_config.compilation_config
    return config.static_forward_context["model.layers.0.self_attn.attn"]


def _tokens(llm: Any) -> list[list[int]]:
    outputs = generate(llm, random_prompts(LENGTHS), NUM_TOKENS, logprobs=None)
    return [output.tokens for output in outputs]


@pytest.fixture(scope="module")
def expected(tiny_llama: str) -> list[list[int]]:
    """Tokens of the V1 runner with the CPU's attention."""
    llm = _engine(tiny_llama)
    runner = type(worker_of(llm).model_runner)
    assert runner.__module__ == "vllm.v1.worker.cpu_model_runner"
    tokens = _tokens(llm)
    close(llm)
    return tokens


def run_backend(model: str, backend: str, layouts: list[str]) -> list[dict[str, Any]]:
    """Tokens of the V2 runner with a backend, and the classes that made them."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    use_backend(backend)
    results = []
    for layout in layouts:
        os.environ["VLLM_KV_CACHE_LAYOUT"] = layout
        CALLS.clear()
        llm = _engine(model)
        results.append(
            {
                "tokens": _tokens(llm),
                "is_v2": isinstance(worker_of(llm).model_runner, GPUModelRunner),
                "impl": type(_layer(llm).impl).__name__,
                "calls": dict(CALLS),
                "strides": [_layer(llm).kv_cache.stride(dim) for dim in (2, 1)],
            }
        )
        close(llm)
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "layouts"),
    [
        ("TRITON_ATTN", ["NHD"]),
        ("FLASH_ATTN", ["NHD"]),
        ("FLASHINFER", ["NHD", "HND"]),
    ],
)
def test_a_backend_gives_the_tokens_of_the_cpus(
    tiny_llama: str, expected: list[list[int]], backend: str, layouts: list[str]
) -> None:
    """Prompts longer than a step are cut, so a step mixes prompts and generation."""
    results = run_in_process(
        "tests.test_gpu_on_cpu:run_backend",
        {"model": tiny_llama, "backend": backend, "layouts": layouts},
    )
    for layout, result in zip(layouts, results, strict=True):
        assert result["is_v2"]
        assert result["impl"] == IMPLS[backend]
        assert set(result["calls"]) == KERNELS[backend]
        row = 2 * HEAD_SIZE
        assert (
            result["strides"] == {"NHD": [2 * row, row], "HND": [row, 32 * row]}[layout]
        )
        assert result["tokens"] == expected


def run_graphs(model: str, backends: list[str]) -> list[dict[str, Any]]:
    """Tokens with full graphs for generation, and how many steps ran in one."""
    use_full_graphs("FULL_DECODE_ONLY", max_tokens=8)
    results = []
    for backend in backends:
        use_backend(backend)
        llm = _engine(model)
        CALLS.clear()
        results.append({"tokens": _tokens(llm), "num_replays": CALLS["replay"]})
        close(llm)
    return results


@pytest.mark.slow
def test_full_graphs_give_the_same_tokens(
    tiny_llama: str, expected: list[list[int]]
) -> None:
    """Once every prompt is computed, each step is a replay."""
    results = run_in_process(
        "tests.test_gpu_on_cpu:run_graphs",
        {"model": tiny_llama, "backends": ["TRITON_ATTN", "FLASHINFER"]},
    )
    for result in results:
        assert result["num_replays"] >= NUM_TOKENS - 2
        assert result["tokens"] == expected


def test_a_failure_names_its_cause() -> None:
    with pytest.raises(RuntimeError, match="backend is 'NO_ATTN'; valid: CPU_ATTN"):
        run_in_process("tests.gpu_on_cpu:use_backend", {"name": "NO_ATTN"})


def test_a_process_that_does_not_end_is_ended() -> None:
    with pytest.raises(RuntimeError, match="signal:pause ended with -14"):
        run_in_process("signal:pause", {}, timeout=1)


def run_fp8(model: str) -> dict[str, Any]:
    """First layer's keys in a cache of floats, and in one of 8 bits."""
    use_backend("TRITON_ATTN")
    held = []
    for dtype in ("auto", "fp8"):
        llm = _engine(model, kv_cache_dtype=dtype)
        (req_id,) = start(llm, random_prompts([70]), 4)
        blocks = scheduler_of(llm).kv_cache_manager.get_block_ids(req_id)[0]
        cache = _layer(llm).kv_cache
        if dtype == "fp8":
            cache = cache.view(torch.float8_e4m3fn)
        held.append(cache[blocks].transpose(1, 2).flatten(0, 1)[:70].clone())
        finished = []
        while llm.llm_engine.has_unfinished_requests():
            finished += [o for o in llm.llm_engine.step() if o.finished]
        (output,) = finished
        close(llm)
    exact, rounded = held
    return {
        "is_rounded": torch.equal(exact.to(rounded.dtype).float(), rounded.float()),
        "largest": exact.abs().max().item(),
        "num_tokens": len(output.outputs[0].token_ids),
    }


def test_fp8_caches_hold_the_rounded_values(tiny_llama: str) -> None:
    """The first layer's keys depend on no attention, so they differ by rounding
    alone."""
    result = run_in_process("tests.test_gpu_on_cpu:run_fp8", {"model": tiny_llama})
    assert result["is_rounded"]
    assert 0.1 < result["largest"] < 448
    assert result["num_tokens"] == 4


def run_kernels(cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Largest differences of the stand-ins from vLLM's kernels, interpreted."""
    from vllm.v1.attention.ops import triton_reshape_and_cache_flash as writing

    # The kernel asks which GPU it is on.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    writing._is_supported_kv_cache_dtype = lambda _: True
    results = []
    for case in cases:
        generator = torch.Generator().manual_seed(0)
        written, cache = _compare_writes(case["kv_cache_dtype"], generator)
        settings = {name: case[name] for name in ("window_size", "softcap", "sinks")}
        output, largest = _compare_attention(cache, settings, generator)
        results.append({"written": written, "output": output, "largest": largest})
    return results


def _compare_writes(
    kv_cache_dtype: str, generator: torch.Generator
) -> tuple[float, torch.Tensor]:
    """The largest difference, and the stand-in's cache."""
    from vllm.v1.attention.ops import triton_reshape_and_cache_flash as writing

    # Triton's interpreter does not round to 8 bits as GPUs do: sixteenths need none.
    tokens = torch.randint(-16, 17, (2, NUM_SLOTS, 2, HEAD_SIZE), generator=generator)
    tokens = tokens / 16
    slots = torch.randperm(NUM_SLOTS, generator=generator)
    slots[::7] = -1
    caches = []
    for write in (writing.triton_reshape_and_cache_flash, stand_ins.write):
        dtype = torch.float32 if kv_cache_dtype == "auto" else stand_ins.FP8
        caches.append(torch.zeros(NUM_SLOTS // 16, 16, 2, 2 * HEAD_SIZE).to(dtype))
        sides = caches[-1].split(HEAD_SIZE, dim=-1)
        write(*tokens, *sides, slots, kv_cache_dtype, *SCALES)
    kernels, ours = (cache.float() for cache in caches)
    return (kernels - ours).abs().max().item(), caches[-1]


def _compare_attention(
    cache: torch.Tensor, settings: dict[str, Any], generator: torch.Generator
) -> tuple[float, float]:
    """The largest difference, and the largest value.

    Of three requests one generates, one is cut, and one has nothing before it.
    """
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    is_fp8 = cache.dtype == stand_ins.FP8
    key, value = cache.split(HEAD_SIZE, dim=-1)
    query = torch.randn(21, 4, HEAD_SIZE, generator=generator)
    blocks = torch.randperm(NUM_SLOTS // 16, generator=generator).int()
    sinks = torch.randn(4, generator=generator) if settings["sinks"] else None
    outputs = []
    for attend in (unified_attention, stand_ins.unified_attention):
        outputs.append(torch.full_like(query, torch.nan))
        attend(
            q=query,
            k=key,
            v=value,
            out=outputs[-1],
            cu_seqlens_q=torch.tensor([0, 1, 18, 21], dtype=torch.int32),
            max_seqlen_q=17,
            seqused_k=torch.tensor([40, 33, 3], dtype=torch.int32),
            max_seqlen_k=40,
            block_table=blocks.view(3, -1),
            softmax_scale=HEAD_SIZE**-0.5,
            causal=True,
            q_descale=None,
            k_descale=SCALES[0].expand(3, 2),
            v_descale=SCALES[1].expand(3, 2),
            kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if is_fp8 else KVQuantMode.NONE,
            **(settings | {"sinks": sinks}),
        )
    kernels, ours = outputs
    return (kernels - ours).abs().max().item(), kernels.abs().max().item()


def test_the_stand_ins_compute_what_the_kernels_do() -> None:
    """vLLM's own kernels, interpreted, on the same small caches."""
    plain = {"window_size": [-1, -1], "softcap": 0.0, "sinks": False}
    forms = [plain, plain | {"window_size": [7, 0]}, plain | {"softcap": 3.0}]
    cases = [
        form | {"kv_cache_dtype": dtype}
        for dtype in ("auto", "fp8")
        for form in [*forms, plain | {"sinks": True}]
    ]
    results = run_in_process("tests.test_gpu_on_cpu:run_kernels", {"cases": cases})
    for case, result in zip(cases, results, strict=True):
        assert result["written"] == 0, case
        assert result["output"] < 1e-5 * result["largest"], case


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_flashinfer_reads_what_was_planned(kv_layout: str) -> None:
    """A request of 21 tokens lies in pages 4 and 1, and one of 16 tokens in page 2."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, 16, 2, 2 * HEAD_SIZE, generator=generator)
    query = torch.randn(2, 4, HEAD_SIZE, generator=generator)
    pages = tokens if kv_layout == "NHD" else tokens.transpose(1, 2).contiguous()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(0), kv_layout)
    outputs = {}
    for last_page_len in (5, 4):
        wrapper.plan(
            torch.tensor([0, 2, 3], dtype=torch.int32),
            torch.tensor([4, 1, 2], dtype=torch.int32),
            torch.tensor([last_page_len, 16], dtype=torch.int32),
            num_qo_heads=4,
            num_kv_heads=2,
            head_dim=HEAD_SIZE,
            page_size=16,
            sm_scale=0.3,
            window_left=-1,
            logits_soft_cap=None,
        )
        outputs[last_page_len] = torch.empty_like(query)
        sides = pages.split(HEAD_SIZE, dim=-1)
        wrapper.run(query, sides, out=outputs[last_page_len])
    held = torch.cat([tokens[4], tokens[1, :5]]), tokens[2]
    for index, rows in enumerate(held):
        key, value = rows.repeat_interleave(2, dim=1).transpose(0, 1).split(32, dim=-1)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[index][:, None], key, value, scale=0.3
        )
        torch.testing.assert_close(outputs[5][index], expected[:, 0])
    assert not torch.allclose(outputs[4][0], outputs[5][0])
    assert torch.equal(outputs[4][1], outputs[5][1])
