"""Small engines, and helpers that look into them."""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MIB = 2**20


@dataclass(frozen=True)
class Generation:
    """One request's output."""

    tokens: list[int]
    logprobs: list[float]
    num_cached: int = field(default=0, compare=False)
    """Prompt tokens from the prefix cache."""


#: What engines of tests have, unless a test asks for something else.
DEFAULTS: dict[str, Any] = {
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


_freeze = gc.freeze
#: Objects of a heap that is slow to collect: more than those of an engine.
_MANY = 20_000


@functools.cache
def _spare_repeats() -> None:
    """Let vLLM do some work once in a process instead of once for each engine.

    It collects the garbage of the whole heap eight times around an engine, all that was
    imported too, for seconds; and looks through all modules for kernels to replace.
    """
    from vllm.platforms.cpu import CpuPlatform

    gc.freeze = gc.unfreeze = lambda: None  # type: ignore[assignment]
    replace_kernels = functools.cache(CpuPlatform.register_triton_kernel_overrides)
    CpuPlatform.register_triton_kernel_overrides = staticmethod(replace_kernels)


def make_llm(model: str, **settings: Any) -> Any:
    """An engine in this process."""
    import pyramid_vllm  # noqa: F401, I001
    from vllm import LLM

    _spare_repeats()
    if len(gc.get_objects()) > _MANY:  # modules that were imported since the last time
        gc.collect()
        _freeze()
    return LLM(model=model, **(DEFAULTS | settings))


def close(llm: Any) -> None:
    """Free an engine's memory before the next engine is made."""
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
        num_cached = output.num_cached_tokens or 0
        results.append(Generation(list(completion.token_ids), values, num_cached))
    return results


def texts_of_policy_and_stock(
    model: str, prompts: list[str], max_tokens: int, **settings: Any
) -> tuple[list[str], list[str]]:
    """Greedy answers of an engine made for them: by its policy, and without it."""
    from vllm import SamplingParams

    llm = make_llm(model, skip_tokenizer_init=False, **settings)
    found = []
    try:
        for extra_args in (None, {"kv_policy": "none"}):
            sampling = SamplingParams(
                temperature=0.0, max_tokens=max_tokens, extra_args=extra_args
            )
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            found.append([output.outputs[0].text for output in outputs])
    finally:
        close(llm)
    return found[0], found[1]


def scheduler_of(llm: Any) -> Any:
    """The engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker_of(llm: Any) -> Any:
    """The engine's worker."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def random_prompts(
    lengths: list[int], vocab_size: int = 512, seed: int = 0
) -> list[list[int]]:
    """Prompts of random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def start(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[str]:
    """Queue greedy requests and step until every prompt is computed."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    req_ids = list(scheduler.requests)
    while any(
        scheduler.requests[req_id].num_computed_tokens < len(prompt)
        for req_id, prompt in zip(req_ids, prompts, strict=True)
    ):
        engine.step()
    return req_ids


def drain(llm: Any) -> None:
    """Step until nothing is left."""
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def run_two_ahead(llm: Any) -> list[list[int]]:
    """Run what is queued; each step is planned before the step in front of it has run.

    Returns:
        Output tokens, in the order in which the requests were queued.
    """
    core = llm.llm_engine.engine_core.engine_core
    scheduler, executor = core.scheduler, core.model_executor
    requests, flying = list(scheduler.requests.values()), []
    while scheduler.has_unfinished_requests() or flying:
        if scheduler.has_unfinished_requests():
            flying.append(scheduler.schedule())
        if len(flying) == 2 or not scheduler.has_unfinished_requests():
            output = flying.pop(0)
            result = executor.execute_model(output)
            result = executor.sample_tokens(None) if result is None else result
            scheduler.update_from_output(output, result)
            scheduler.check_integrity()
    return [list(request.output_token_ids) for request in requests]


def held_kv(llm: Any, req_id: str, layer: int) -> tuple[Any, Any]:
    """Keys and values that a layer holds of a request, oldest first.

    Each is ``[num_held, num_kv_heads, head_size]``.
    """
    from pyramid_vllm.attention.registry import access_of

    scheduler, runner = scheduler_of(llm), worker_of(llm).model_runner
    name = f"model.layers.{layer}.self_attn.attn"
    groups = scheduler.kv_cache_config.kv_cache_groups
    (group_id,) = [i for i, group in enumerate(groups) if name in group.layer_names]
    block_ids = scheduler.kv_cache_manager.get_block_ids(req_id)[group_id]
    num_held = scheduler.requests[req_id].num_computed_tokens
    if hasattr(scheduler, "tier_lengths"):
        tier = groups[group_id].kv_cache_spec.tier
        num_held -= scheduler.tier_lengths.evicted(req_id)[tier]
    layer = runner.compilation_config.static_forward_context[name]
    key, value = (
        view[block_ids].transpose(1, 2).flatten(0, 1)[:num_held].clone()
        for view in access_of(layer).views(layer.kv_cache)
    )
    return key, value


@contextmanager
def record_chunks(scheduler: Any) -> Iterator[list[list[int]]]:
    """Tokens of every step of every request, in the order of their arrival."""
    schedule = scheduler.schedule
    by_request: dict[str, list[int]] = {}
    steps: list[list[int]] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for req_id, count in output.num_scheduled_tokens.items():
            by_request.setdefault(req_id, []).append(count)
        return output

    scheduler.schedule = recording
    try:
        yield steps
    finally:
        scheduler.schedule = schedule
        # The engine numbers requests and adds a random suffix.
        names = sorted(by_request, key=lambda name: int(name.split("-")[0]))
        steps.extend(by_request[name] for name in names)
