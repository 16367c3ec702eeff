"""The process of some engines, one after the other: what each generates and counts.

A task is a dictionary: ``folder`` of the model, made where it is empty with
``num_layers`` and ``head_size``, ``backend``, ``dtype``, ``sides`` by name, ``lengths``
of prompts, ``num_tokens`` of outputs, ``on_cpu``, ``oracles``: the sides that
are compared with it, and ``seed``.
"""

import gc
import os
from pathlib import Path
from typing import Any

from pyramid_vllm.tools.engine_process import leave, read_task, tell


def _set_up(task: dict[str, Any]) -> None:
    """Set the process up; this has to be done before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Attention multiplies in float32; the oracle multiplies in float64.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    if not task["on_cpu"]:
        return
    from tests import gpu_on_cpu

    gpu_on_cpu.prepare()
    gpu_on_cpu.use_wrapped_backend(task["backend"])


def _make_model(task: dict[str, Any]) -> None:
    """Write the model, which is the same for all processes, if no other one has."""
    from tests.models import TINY_LLAMA, save_tiny_llama

    folder = Path(task["folder"])
    if not (folder / "model.safetensors").exists():
        sizes = {"head_dim": task["head_size"], "num_hidden_layers": task["num_layers"]}
        save_tiny_llama(folder, TINY_LLAMA | sizes)


def _settings(task: dict[str, Any], side: dict[str, Any]) -> dict[str, Any]:
    """Settings of an engine, with those of its side."""
    settings = {
        "dtype": task["dtype"],
        "enforce_eager": False,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 16,
    }
    if not task["on_cpu"]:
        settings |= {"attention_backend": task["backend"]}
        settings |= {"kv_cache_memory_bytes": 256 * 2**20}
    return settings | side


def _run(task: dict[str, Any], name: str) -> dict[str, Any]:
    """The outputs of one engine, and what it reports of itself."""
    from tests.engines import (
        close,
        generate,
        make_llm,
        random_prompts,
        record_chunks,
        scheduler_of,
        worker_of,
    )

    # Modules stay loaded, so the garbage collector need not look through them.
    gc.freeze()
    settings = _settings(task, task["sides"][name])
    if task["on_cpu"]:
        _choose_graphs(settings)
    llm = make_llm(task["folder"], **settings)
    prompts = random_prompts(task["lengths"], seed=task["seed"])
    with record_chunks(scheduler_of(llm)) as steps:
        outputs = generate(llm, prompts, task["num_tokens"])
    counters = getattr(scheduler_of(llm), "kv_counters", None)
    result = {
        "tokens": [output.tokens for output in outputs],
        "logprobs": [output.logprobs for output in outputs],
        "counters": None if counters is None else _counts(counters),
        "engine": _describe(llm),
    }
    policy = getattr(worker_of(llm), "kv_policy", None)
    close(llm)
    if name in task["oracles"]:
        result["oracle"] = _oracle(task, policy, prompts, steps, outputs)
    return result


def _counts(counters: Any) -> dict[str, int]:
    """Counts over all tiers."""
    names = ("num_compactions", "num_groups", "num_evicted_tokens", "num_pages_freed")
    return {name: getattr(counters, name) for name in names}


def _choose_graphs(settings: dict[str, Any]) -> None:
    """Choose graphs on the CPU, where those like a GPU's change vLLM's classes."""
    import torch

    from tests import gpu_on_cpu_graphs

    captures = torch.cuda.CUDAGraph is gpu_on_cpu_graphs.Graph
    if not settings["enforce_eager"] and not captures:
        gpu_on_cpu_graphs.use_full_graphs("FULL_DECODE_ONLY", max_tokens=8)
    # Nothing is compiled there.
    settings["enforce_eager"] = True
    settings.pop("compilation_config", None)


def _describe(llm: Any) -> dict[str, str]:
    """Names of the classes that ran."""
    from tests.engines import worker_of

    runner = worker_of(llm).model_runner
    config = worker_of(llm).vllm_config.compilation_config
    layers = config.static_forward_context
    layer = layers["model.layers.0.self_attn.attn"]
    return {
        "runner": f"{type(runner).__module__}.{type(runner).__name__}",
        "attention": type(layer.impl).__name__,
        "graphs": str(config.cudagraph_mode),
        "compilation": str(config.mode),
    }


def _oracle(
    task: dict[str, Any],
    policy: Any,
    prompts: list[list[int]],
    steps: list[list[int]],
    outputs: list[Any],
) -> list[dict[str, Any]]:
    """Compare each request with the oracle, which is forced to its tokens."""
    from tests.oracle import DenseModel, Oracle

    oracle, found = Oracle(DenseModel(task["folder"]), policy), []
    for prompt, sizes, output in zip(prompts, steps, outputs, strict=True):
        chunks, done = [], 0
        for size in sizes:
            if done < len(prompt):
                chunks.append(size)
                done += size
        expected = oracle.run(prompt, chunks, output.tokens)
        rows = [row.tolist() for row in expected.logprobs]
        triples = list(zip(output.tokens, output.logprobs, rows, strict=True))
        found.append(
            {
                "length": len(prompt),
                "decided": expected.decided,
                # How much less likely than the oracle's best token ours is.
                "max_gap": max(max(row) - row[token] for token, _, row in triples),
                "max_error": max(abs(row[token] - p) for token, p, row in triples),
            }
        )
    return found


def main() -> None:
    """Entry point of the child process."""
    task = read_task()
    _set_up(task)
    _make_model(task)
    for name in task["sides"]:
        tell("result", {name: _run(task, name)})
    leave()


if __name__ == "__main__":
    main()
