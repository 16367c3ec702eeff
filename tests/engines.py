"""Small engines, and what tests look at in them."""

import gc
from dataclasses import dataclass
from typing import Any

import numpy as np

MIB = 2**20


@dataclass(frozen=True)
class Generation:
    """One request's output."""

    tokens: list[int]
    logprobs: list[float]


def make_llm(model: str, **settings: Any) -> Any:
    """An engine in this process."""
    import pyramid_vllm  # noqa: F401, I001
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 16 * MIB,
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    return LLM(model=model, **(defaults | settings))


def close(llm: Any) -> None:
    """Let an engine's memory go before the next one is made."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def generate(
    llm: Any, prompts: list[list[int]], max_tokens: int, logprobs: int | None = 0
) -> list[Generation]:
    """Greedy outputs of fixed length."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=logprobs,
        detokenize=False,
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    results = []
    for output in outputs:
        completion = output.outputs[0]
        values = [
            step[token].logprob
            for token, step in zip(
                completion.token_ids, completion.logprobs or (), strict=False
            )
        ]
        results.append(Generation(list(completion.token_ids), values))
    return results


def scheduler_of(llm: Any) -> Any:
    """The engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker_of(llm: Any) -> Any:
    """The engine's worker."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def random_prompts(lengths: list[int], vocab_size: int = 512, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]
