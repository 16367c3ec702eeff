"""Outputs of small engines, to compare vLLM's own hooks with our overrides.

``python -m tests.hook_tokens v1|v2 RESULT``, in a process whose environment chooses.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

#: Evicts, by several cache groups a tier; prunes and compresses; gathers shared pages.
POLICIES: dict[str, dict[str, Any]] = {
    "pyramid": {
        "kv_policy": {
            "base": "pyramid",
            "tiers": 4,
            "recent": 24,
            "min_context": 40,
            "retention": 0.4,
            "growth_reserve": 0,
        },
        "max_num_batched_tokens": 128,
    },
    "pyramidinfer": {
        "kv_policy": {
            "base": "pyramidinfer",
            "prefill_decay_ratio": 0.3,
            "min_context_length": 8,
            "recent": 4,
            "exceed_length_to_compress": 8,
            "growth_reserve": 0,
        },
        "max_num_batched_tokens": 512,
    },
    "cached": {
        "kv_policy": {
            "base": "snapkv",
            "tiers": 2,
            "recent": 16,
            "min_context": 40,
            "retention": 0.3,
            "growth_reserve": 0,
        },
        "enable_prefix_caching": True,
    },
}


def run(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Tokens and counts of one engine, whose requests preempt each other."""
    from tests.engines import close, generate, make_llm, random_prompts, scheduler_of

    small = {
        "kv_cache_memory_bytes": 2 * 2**20,
        "max_model_len": 512,
        "max_num_seqs": 8,
    }
    llm = make_llm(model, **small, **settings)
    scheduler = scheduler_of(llm)
    preempt, num_preempted = scheduler._preempt_request, 0

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_preempted
        num_preempted += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = count
    prompts = random_prompts([60, 129, 333, 333, 200], seed=3)
    # A second round of the same prompts: what is cached of them is hit.
    tokens = [
        generation.tokens
        for _ in range(2)
        for generation in generate(llm, prompts, 40, logprobs=None)
    ]
    scheduler.check_integrity()
    counters = scheduler.kv_counters
    counts = {
        "compactions": counters.num_compactions,
        "pages": counters.num_pages_freed,
        "groups": counters.num_groups,
        "preempted": num_preempted,
    }
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    counts["worker pages"] = worker.tier_state.counters.num_pages_freed
    counts["pruned steps"] = worker.tier_state.counters.num_pruned_steps
    close(llm)
    assert counts["compactions"], "nothing was evicted"
    assert counts["worker pages"], "no row was cut"
    return {"tokens": tokens, "counts": counts}


def main(runner: str, result: str) -> None:
    """Write the tokens of every policy, and which vLLM made them."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if runner == "v2":
        from tests import gpu_on_cpu

        gpu_on_cpu.prepare()
        gpu_on_cpu.use_wrapped_backend("TRITON_ATTN")
    else:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import vllm

    from tests.models import TINY_LLAMA, save_tiny_llama

    found: dict[str, Any] = {"vllm": str(vllm.__file__)}
    with TemporaryDirectory() as folder:
        model = save_tiny_llama(Path(folder), TINY_LLAMA)
        for name, settings in POLICIES.items():
            found[name] = run(model, settings)
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
