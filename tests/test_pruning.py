"""Pruned prefill and compressed generation in running engines."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from pyramid_vllm.attention.cpu import cpu_views
from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.stats import PROMPT_LOGPROBS
from tests.engines import (
    MIB,
    close,
    drain,
    generate,
    held_kv,
    make_llm,
    random_prompts,
    record_chunks,
    scheduler_of,
    start,
    worker_of,
)
from tests.models import TINY_LLAMA, save_tiny
from tests.oracle import DenseModel, Oracle
from tests.oracle.counts import LayerCounts
from tests.scheduling import (
    BLOCK_SIZE,
    Driver,
    free_pages,
    held_pages,
    make_request,
    make_scheduler,
)

STEEP = {"prefill_decay_ratio": 0.3, "min_context_length": 8}
PRUNED = {
    "retention": 0.4,
    "recent": 16,
    "min_context": 24,
    "tiers": 3,
    "prune_from": 2,
    "exceed_length_to_compress": 8,
    "gen_decay_ratio": 0.4,
}


def page_sum(counts: Any) -> int:
    return sum(math.ceil(count / BLOCK_SIZE) for count in counts)


# Pages.


def test_a_pruned_token_never_gets_a_page(tiny_llama: str) -> None:
    """A prompt never holds more pages than its tiers' counts need."""
    scheduler = make_scheduler(
        tiny_llama,
        200,
        {"base": "pyramidinfer", **STEEP},
        max_num_batched_tokens=2048,
        max_model_len=2048,
    )
    total = fewest = free_pages(scheduler)
    pool = scheduler.kv_cache_manager.block_pool
    get_new_blocks = pool.get_new_blocks

    def watch(count: int) -> Any:
        nonlocal fewest
        blocks = get_new_blocks(count)
        fewest = min(fewest, free_pages(scheduler))
        return blocks

    pool.get_new_blocks = watch
    scheduler.add_request(make_request("a", prompt=900, output=2))
    Driver(scheduler).step()
    counts = LayerCounts(scheduler.kv_rule.config, 6).prompt(900)
    assert counts[-1] < 500
    assert total - fewest == page_sum(counts)
    assert sum(held_pages(scheduler, "a").values()) == page_sum(counts)


def test_a_prompt_longer_than_the_uncompressed_memory_runs(tmp_path: Path) -> None:
    """Stock vLLM refuses to start there; the result is the same as in more memory."""
    model = save_tiny(tmp_path, "llama", 6)
    dense = DenseModel(model)
    settings = {"max_model_len": 1300, "max_num_batched_tokens": 1300}
    memory = 7 * MIB // 2  # 37 pages of 32 tokens in all six layers: 1,184 tokens
    with pytest.raises(ValueError, match="KV cache"):
        make_llm(model, kv_cache_memory_bytes=memory, **settings)
    llm = make_llm(
        model,
        kv_policy="pyramidinfer",
        kv_policy_config=STEEP | {"gen_queries": 1},
        kv_cache_memory_bytes=memory,
        max_num_seqs=2,
        **settings,
    )
    (prompt,) = random_prompts([1250], vocab_size=1024)
    (ours,) = generate(llm, [prompt], 16)
    expected = Oracle(dense, worker_of(llm).kv_policy).run(prompt, [1250], ours.tokens)
    assert expected.decided
    for token, logprob, row in zip(
        ours.tokens, ours.logprobs, expected.logprobs, strict=True
    ):
        assert logprob == pytest.approx(float(row[token]), abs=1e-3)
    assert worker_of(llm).tier_state.counters.num_pruned_steps == 1
    scheduler_of(llm).check_integrity()
    close(llm)


@pytest.mark.parametrize("policy", ["pyramidinfer", "pyramid"])
def test_a_long_output_holds_what_the_policy_says(tiny_llama: str, policy: str) -> None:
    """1,024 tokens follow a prompt of 64; every tier's counts and the pages in use are
    checked."""
    config = STEEP if policy == "pyramidinfer" else PRUNED
    llm = make_llm(
        tiny_llama, kv_policy=policy, kv_policy_config=config, max_model_len=2048
    )
    scheduler = scheduler_of(llm)
    total = free_pages(scheduler)
    prompts = random_prompts([64, 40])
    req_ids = start(llm, prompts, 1030)
    counts = LayerCounts(scheduler.kv_rule.config, 6)
    while scheduler.requests[req_ids[0]].num_computed_tokens < 64 + 1024:
        llm.llm_engine.step()
        scheduler.check_integrity()
    pages = 0
    for req_id, prompt in zip(req_ids, prompts, strict=True):
        computed = scheduler.requests[req_id].num_computed_tokens
        generated = computed - len(prompt)
        groups = counts.groups(len(prompt), generated)
        assert groups > 40
        held = [
            kept + generated - groups * (counts.config.exceed_length_to_compress - left)
            for kept, left in zip(
                counts.prompt(len(prompt)), counts.group_kept(), strict=True
            )
        ]
        evicted = scheduler.tier_lengths.evicted(req_id)
        tiers = scheduler.kv_rule.layout.tier_of_layer
        assert [computed - evicted[tier] for tier in tiers] == held
        by_tier = dict(zip(tiers, held, strict=True))
        assert held_pages(scheduler, req_id) == {
            tier: math.ceil(length / BLOCK_SIZE) for tier, length in by_tier.items()
        }
        pages += page_sum(by_tier.values())
        for layer in range(6):
            assert len(held_kv(llm, req_id, layer)[0]) == held[layer]
    assert total - free_pages(scheduler) == pages
    queries = worker_of(llm).tier_state.step.generated
    assert len(queries) == 2
    drain(llm)
    generate(llm, random_prompts([40]), 2)
    assert len(queries) == 1, "queries outlive their requests"
    close(llm)


def test_the_buffer_of_queries_is_taken_from_the_kv_memory(tiny_llama: str) -> None:
    def num_blocks(**config: Any) -> int:
        llm = make_llm(
            tiny_llama,
            kv_policy="pyramid-by-depth",
            kv_policy_config=PRUNED | config,
            max_num_seqs=16,
        )
        blocks = scheduler_of(llm).kv_cache_config.num_blocks
        queries = worker_of(llm).tier_state.step.generated
        if queries is not None:
            # layers, sequences, queries, heads, size of a head, float32
            size = queries.buffer.numel() * 4
            assert size == 6 * 16 * config["gen_queries"] * 4 * 32 * 4
            page = 2 * 16384  # two layers for each KV cache group
            assert blocks == (16 * MIB - size) // page
        close(llm)
        return blocks

    assert (
        num_blocks(gen_queries=16)
        < num_blocks(gen_queries=4)
        < num_blocks(exceed_length_to_compress=None)
    )
    with pytest.raises(KVPolicyError, match=r"max_num_seqs=16.*lower max_num_seqs"):
        num_blocks(gen_queries=1024)


# Which requests are pruned.


def test_prompt_logprobs_are_served_unpruned(tiny_llama: str) -> None:
    """They are stock vLLM's, while other requests are pruned; the counter reports
    it."""
    from vllm import SamplingParams

    prompts = random_prompts([300, 300])

    def prompt_logprobs(llm: Any) -> list[Any]:
        sampling = [
            SamplingParams(
                temperature=0.0, max_tokens=8, prompt_logprobs=count, detokenize=False
            )
            for count in (1, None)
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        assert outputs[1].prompt_logprobs is None
        return [
            {token: value.logprob for token, value in row.items()}
            for row in outputs[0].prompt_logprobs[1:]
        ]

    stock = make_llm(tiny_llama)
    expected = prompt_logprobs(stock)
    close(stock)
    llm = make_llm(tiny_llama, kv_policy="pyramidinfer", kv_policy_config=STEEP)
    ours = prompt_logprobs(llm)
    assert len(ours) == 299
    for a, b in zip(ours, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    counters = worker_of(llm).tier_state.counters
    pruned = LayerCounts(worker_of(llm).kv_policy, 6).rows(0, 300)
    assert counters.num_computed.tolist() == [300 + rows for rows in pruned]
    assert scheduler_of(llm).kv_counters.unpruned == {PROMPT_LOGPROBS: 1}
    close(llm)


def test_an_unpruned_prompt_is_cut_to_what_the_memory_holds(tiny_llama: str) -> None:
    scheduler = make_scheduler(
        tiny_llama,
        80,
        {"base": "pyramidinfer", "tiers": 2, **STEEP},
        max_num_batched_tokens=2048,
        max_model_len=1500,
    )
    request = make_request("a", prompt=1400, output=4)
    request.sampling_params.prompt_logprobs = 1
    scheduler.add_request(request)
    driver = Driver(scheduler)
    driver.run()
    assert request.num_output_tokens == 4
    assert len(driver.plans) > 5, "the prompt was not cut"
    assert not any(plan.prunes for plan in driver.plans)


@pytest.mark.parametrize("policy", [PRUNED, {"base": "pyramidinfer", **STEEP}])
def test_preempted_requests_get_their_tokens_again(
    tiny_llama: str, policy: dict[str, Any]
) -> None:
    """A replay compresses generated tokens at the same places."""
    prompts = random_prompts([90, 60, 75, 81, 40])
    llm = make_llm(tiny_llama, kv_policy=policy, max_num_seqs=8)
    together = generate(llm, prompts, 120)
    alone = [generate(llm, [prompt], 120)[0] for prompt in prompts]
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    scheduler = scheduler_of(llm)
    groups = scheduler.kv_counters.num_groups
    req_ids = start(llm, prompts, 120)
    for _ in range(70):
        llm.llm_engine.step()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    tokens = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        scheduler.check_integrity()
    names = [req_id.split("-")[0] for req_id in req_ids]
    assert [tokens[name] for name in names] == [g.tokens for g in alone]
    assert scheduler.kv_counters.num_groups > 1.5 * groups
    close(llm)


# Which models.

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
}


def save_family(folder: Path, family: str, **settings: Any) -> str:
    torch.manual_seed(0)
    common = TINY_LLAMA | {"initializer_range": 0.1} | settings
    if family in ("qwen2", "qwen2_moe"):
        common.pop("head_dim")
    config = AutoConfig.for_model(family, **common)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_the_common_loop_are_pruned(tmp_path: Path, family: str) -> None:
    """Requests in a batch get their tokens as alone, and deeper layers compute fewer
    rows."""
    model = save_family(tmp_path, family, **FAMILIES[family])
    llm = make_llm(model, kv_policy="pyramid-by-depth", kv_policy_config=PRUNED)
    counters = worker_of(llm).tier_state.counters
    prompts = random_prompts([300, 40, 129])
    together = generate(llm, prompts, 24)
    rows = np.sum(
        [LayerCounts(worker_of(llm).kv_policy, 6).rows(0, n) for n in (300, 40, 129)],
        axis=0,
    )
    assert counters.num_computed.tolist() == rows.tolist()
    assert rows[-1] < rows[0] == 469
    for prompt, generation in zip(prompts, together, strict=True):
        (alone,) = generate(llm, [prompt], 24)
        assert alone.logprobs == pytest.approx(generation.logprobs, abs=1e-3)
    close(llm)


def test_internlm2_has_the_common_loop(tmp_path: Path) -> None:
    """transformers has no InternLM2: the decoder layer alone is looked at."""
    import inspect

    from vllm.model_executor.models.internlm2 import InternLMDecoderLayer

    names = list(inspect.signature(InternLMDecoderLayer.forward).parameters)
    assert names[1:4] == ["positions", "hidden_states", "residual"]


def test_a_model_with_another_loop_is_refused_by_name(tmp_path: Path) -> None:
    model = save_family(tmp_path, "granite")
    with pytest.raises(KVPolicyError, match="prune_from with GraniteForCausalLM"):
        make_llm(model, kv_policy="pyramid-by-depth", kv_policy_config=PRUNED)
    llm = make_llm(
        model, kv_policy="pyramid-by-depth"
    )  # without pruning it is supported
    close(llm)


def test_layers_without_full_attention_are_refused(tmp_path: Path) -> None:
    model = save_family(
        tmp_path,
        "gemma3_text",
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    with pytest.raises(KVPolicyError, match="no full attention"):
        make_llm(model, kv_policy="pyramid-by-depth", kv_policy_config=PRUNED)


def test_lora_is_refused_with_pruning(tiny_llama: str) -> None:
    with pytest.raises(ValueError, match="enable_lora with prune_from="):
        make_llm(
            tiny_llama,
            kv_policy="pyramid-by-depth",
            kv_policy_config=PRUNED,
            enable_lora=True,
        )


# Activation, and a second opinion.


def test_a_step_that_should_prune_and_does_not_stops_the_engine(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyramid_vllm.worker.prune import RowPruner

    llm = make_llm(tiny_llama, kv_policy="pyramid-by-depth", kv_policy_config=PRUNED)
    monkeypatch.setattr(RowPruner, "_enter", lambda *_: None)
    with pytest.raises(RuntimeError, match="rows, its plan has"):
        generate(llm, random_prompts([300]), 2)
    close(llm)


def test_attention_reads_what_an_independent_mask_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer's attention, in steps that prune, decode and compress, against
    xformers' masks over the same paged tables; lengths by the oracle's counts."""
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    model = save_tiny(tmp_path, "llama", 6)
    llm = make_llm(
        model,
        kv_policy="pyramid-by-depth",
        kv_policy_config=PRUNED,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=3 * MIB,
        max_num_seqs=4,
    )
    stock, seen = CPUAttentionBackendImpl.forward, []

    def checked(self: Any, layer: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(self, layer, query, *args, **kwargs)
        cache, metadata = args[2], args[3]
        starts = metadata.query_start_loc.tolist()
        rows = [b - a for a, b in itertools.pairwise(starts)]
        mask = bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=rows,
            kv_seqlen=metadata.seq_lens.tolist(),
            block_tables=metadata.block_table,
            page_size=cache.shape[2],
        )
        key, value = (
            part.transpose(1, 2).flatten(0, 1).double() for part in cpu_views(cache)
        )
        table = metadata.block_table
        shape = len(query), table.numel() * cache.shape[2]
        allowed = mask.materialize(shape).double()
        key, value = key[: allowed.shape[1]], value[: allowed.shape[1]]
        heads = query.shape[1] // key.shape[1]
        logits = torch.einsum(
            "qhd,khd->hqk", query.double(), key.repeat_interleave(heads, 1)
        )
        share = torch.softmax(logits * self.scale + allowed, -1)
        expected = torch.einsum(
            "hqk,khd->qhd", share, value.repeat_interleave(heads, 1)
        )
        actual = output.view(len(query), *query.shape[1:]).double()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        index = extract_layer_index(layer.layer_name)
        seen.append((index, rows, metadata.seq_lens.tolist()))
        return output

    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", checked)
    prompts = random_prompts([200, 90, 30], vocab_size=1024)
    with record_chunks(scheduler_of(llm)) as steps:
        generate(llm, prompts, 40)
    counts = LayerCounts(worker_of(llm).kv_policy, 6)
    expected_rows = [0] * 6
    for prompt, sizes in zip(prompts, steps, strict=True):
        before = 0
        for size in sizes:
            rows = [size] * 6
            if before < len(prompt):
                rows = counts.rows(before, before + size)
            before += size
            expected_rows = [a + b for a, b in zip(expected_rows, rows, strict=True)]
    for layer in range(6):
        assert (
            sum(sum(rows) for i, rows, _ in seen if i == layer) == expected_rows[layer]
        )
    assert len({tuple(rows) for _, rows, _ in seen}) > 5
    assert scheduler_of(llm).kv_counters.num_groups > 3
    close(llm)


@pytest.mark.timeout(600)
def test_with_compilation_only_pruning_steps_run_uncompiled(tiny_llama: str) -> None:
    """Python's `forward` of the model runs in steps that prune, and in no other."""
    prompts = random_prompts([300, 40, 129])
    eager = make_llm(tiny_llama, kv_policy="pyramid-by-depth", kv_policy_config=PRUNED)
    expected = generate(eager, prompts, 24)
    close(eager)
    llm = make_llm(
        tiny_llama,
        kv_policy="pyramid-by-depth",
        kv_policy_config=PRUNED,
        enforce_eager=False,
    )
    scheduler_of(llm).max_num_scheduled_tokens = 128
    model = worker_of(llm).model_runner.get_model().model
    assert not model.do_not_compile
    counters, forward, num_python = (
        worker_of(llm).tier_state.counters,
        model.forward,
        0,
    )

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_python
        num_python += 1
        return forward(*args, **kwargs)

    model.forward = counted
    with record_chunks(scheduler_of(llm)) as steps:
        generate(llm, prompts, 24)
    num_steps = max(len(sizes) for sizes in steps)
    assert num_python == counters.num_pruned_steps
    assert 0 < num_python < 8 < 24 <= num_steps
    scheduler_of(llm).max_num_scheduled_tokens = 2048
    ours = generate(llm, prompts, 24)
    for a, b in zip(ours, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
    close(llm)
