"""Forced tokens and whole evaluations on real engines."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.quality.distributions import FullRows, PolicyRows
from pyramid_vllm.tools.quality.jobs import Job, JobResult, Request
from pyramid_vllm.tools.quality.runner import make_engine, run_job
from tests.engines import MIB, random_prompts
from tests.one_engine import save_tokenizer

NUM_FORCED = 12
LENGTHS = [300, 61, 450]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Forced requests of several lengths, and a free one between them."""
    prompts, targets = random_prompts(LENGTHS), random_prompts([NUM_FORCED] * 3, seed=1)
    forced = [
        Request(prompt, NUM_FORCED, forced=target)
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    return [forced[0], Request(prompts[2][:200], 5), *forced[1:]]


def engine_of(model: str, policy: dict[str, Any] | None) -> Any:
    llm_args = {
        "model": model,
        "kv_policy": None if policy is None else json.dumps(policy),
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 16 * MIB,
        "max_model_len": 512,
        "max_num_batched_tokens": 2048,
    }
    return make_engine(llm_args)


@pytest.fixture(scope="module")
def results(
    tiny_llama: str, requests: list[Request], tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, Any]:
    """Results of stock vLLM, then of a policy at several retentions on one engine."""
    rows = str(tmp_path_factory.mktemp("rows"))
    found: dict[Any, Any] = {"rows": Path(rows)}
    engine = engine_of(tiny_llama, None)
    found["stock"] = run_job(engine, Job(requests, rows_dir=rows), False, print)
    engine.engine_core.shutdown()
    engine = engine_of(tiny_llama, {"name": "pyramid"})
    for retention in (None, 0.3, 1.0):
        job = Job(requests, retention, rows)
        found[retention] = run_job(engine, job, True, lambda _: None)
    engine.engine_core.shutdown()
    return found


def teacher_forced(model: str, request: Request) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([[*request.prompt_ids, *request.forced]])
    with torch.inference_mode():
        logits = reference(ids).logits[0, len(request.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits, dim=-1)


def test_forced_losses_are_those_of_teacher_forcing(
    tiny_llama: str, requests: list[Request], results: dict[Any, Any]
) -> None:
    stock = results["stock"]
    forced = [i for i, request in enumerate(requests) if request.forced]
    for order, index in enumerate(forced):
        expected = teacher_forced(tiny_llama, requests[index])
        tokens = torch.tensor(requests[index].forced)
        wanted = expected.gather(1, tokens[:, None])[:, 0]
        assert stock.logprobs[index] == pytest.approx(wanted.tolist(), abs=1e-4)
        rows = np.load(results["rows"] / f"{index}.npy")
        assert rows.shape == tuple(expected.shape)
        np.testing.assert_allclose(rows, expected, atol=2e-2)
        tops = expected.argmax(dim=-1).tolist()
        assert stock.rows[order]["top_tokens"] == tops


def test_a_free_request_beside_them_is_greedy(
    tiny_llama: str, requests: list[Request], results: dict[Any, Any]
) -> None:
    tokens = results["stock"].outputs[1]
    free = Request(requests[1].prompt_ids, 5, forced=tokens)
    assert teacher_forced(tiny_llama, free).argmax(dim=-1).tolist() == tokens
    assert results["stock"].logprobs[1] == []


def mean_divergence(result: JobResult, row: int) -> float:
    return float(np.mean(result.rows[row]["divergences"]))


def test_eviction_shows_in_the_losses(results: dict[Any, Any]) -> None:
    stock = results["stock"]
    for retention in (None, 0.3):
        ours = results[retention]
        for index in (0, 3):
            gap = np.abs(np.subtract(ours.logprobs[index], stock.logprobs[index]))
            assert gap.max() > 1e-2
        # A prompt of 61 tokens is kept whole.
        assert ours.logprobs[2] == pytest.approx(stock.logprobs[2], abs=1e-4)
        assert mean_divergence(ours, 0) > 1e-2
        assert abs(mean_divergence(ours, 1)) < 1e-3
        assert ours.activity.num_compactions == 3
        assert ours.activity.kept_tokens < 0.75 * ours.activity.prompt_tokens
        share = ours.activity.kv_bytes_per_request / stock.activity.kv_bytes_per_request
        assert share < 0.9
    assert results[0.3].activity.kept_tokens < results[None].activity.kept_tokens


def test_retention_1_is_the_full_cache(results: dict[Any, Any]) -> None:
    stock, ours = results["stock"], results[1.0]
    for index, logprobs in enumerate(stock.logprobs):
        assert ours.logprobs[index] == pytest.approx(logprobs, abs=1e-4)
    assert ours.activity.num_compactions == 0
    assert ours.activity.kept_tokens == stock.activity.prompt_tokens
    for row in range(3):
        assert abs(mean_divergence(ours, row)) < 1e-3
        assert ours.rows[row]["top_tokens"] == stock.rows[row]["top_tokens"]


def test_divergence_is_exact_but_for_half_precision(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    full, ours = 3 * torch.randn(2, 4, 1000, generator=generator)
    path = tmp_path / "rows" / "0.npy"
    writer = FullRows(path, 4)
    # A row may be seen again, in any order: the last time counts.
    for position in (0, 2, 1, 3, 0):
        writer.see(position, full[position] if position else full[0])
    assert not path.exists()
    writer.result()
    reader = PolicyRows(path, 4)
    for position in range(4):
        reader.see(position, ours[position])
    p, q = torch.log_softmax(full, -1), torch.log_softmax(ours, -1)
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True)
    found = reader.result()["divergences"]
    assert found == pytest.approx(expected.sum(-1).tolist(), rel=1e-3)


def test_the_command_from_end_to_end(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    save_tokenizer(model, 512)
    text = tmp_path / "text.txt"
    words = np.random.default_rng(0).permutation(["lark", "ship", "moon", "tree"] * 300)
    lines = (f"The old {word} is seen by nobody else. " for word in words[:300])
    text.write_text("".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    arguments = [
        *("eval", "--model", str(model), "--text", str(text), "--out", str(out)),
        *("--prompt-tokens", "300", "--target-tokens", "8", "--windows", "2"),
        *("--agreement-tokens", "4", "--kv-memory", "32MiB"),
        *("--retrieval", "single_needle", "--retrieval-tokens", "500"),
        *("--depths", "2", "--samples", "1", "--retention", "0.4"),
    ]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    full, side = report["sides"]
    assert report["versions"]["vllm"]
    for task in ("continuation", "agreement", "single_needle 500"):
        activity = side["tasks"][task]["activity"]
        assert activity["num_compactions"] == 2
        assert 0.3 < activity["kept_tokens"] / activity["prompt_tokens"] < 0.6
        assert side["tasks"][task]["summary"]["kv_share"] < 0.8
    losses = [s["tasks"]["continuation"]["samples"]["loss"] for s in (full, side)]
    assert losses[0] != losses[1]
    assert side["tasks"]["continuation"]["summary"]["divergence"]["low"] > 1e-3
    for name in ("loss.png", "retrieval-pyramid.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    # What is there needs no engine.
    monkeypatch.setattr(subprocess, "Popen", None)
    again = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert again.exit_code == 0, again.stderr
    assert "pyramid: 3 of 3 runs are there" in again.stdout
    assert "100.0%" in again.stdout
