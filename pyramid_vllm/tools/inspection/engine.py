"""One request, one process: runs it and writes down what the cache then holds.

Run as ``python -m pyramid_vllm.tools.inspection.engine``, with an ``EngineTask`` as
JSON on its standard input. It reports a ``result``, or the ``error`` of a policy that
it refuses.
"""

import os
from dataclasses import asdict, dataclass
from typing import Any

from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.tools.engine_process import leave, read_task, run_child, tell


@dataclass(frozen=True)
class EngineTask:
    """What to run."""

    model: str
    kv_policy: str | None
    prompt_ids: list[int]
    max_tokens: int
    stop_ids: list[int]
    engine_args: dict[str, Any]


@dataclass(frozen=True)
class EngineResult:
    """What one request left in the cache."""

    output_ids: list[int]
    held: list[list[list[int]]] | None
    """By layer and KV head: positions; None: stock vLLM, which keeps all."""


def run_engine(task: EngineTask) -> EngineResult:
    """Run a task in a process of its own.

    Raises:
        KVPolicyError: the engine refused the policy.
        RuntimeError: the process failed; the message ends with its last lines.
    """
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    } | os.environ
    results: list[EngineResult] = []

    def hear(message: dict[str, Any]) -> None:
        if "error" in message:
            raise KVPolicyError(message["error"])
        results.append(EngineResult(**message["result"]))

    run_child(__name__, asdict(task), hear, environment)
    return results[0]


def inspect_request(task: EngineTask) -> EngineResult:
    """Run the request in an engine of this process.

    Raises:
        KVPolicyError: the set-up is not one that a record follows.
    """
    import pyramid_vllm  # noqa: F401, I001 (lets `LLM` take a KV policy)
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    has_policy = task.kv_policy is not None
    if has_policy and not current_platform.is_cpu():
        raise KVPolicyError(
            "inspect does not support kernels, which do not say which tokens they "
            f"chose: vLLM runs on {current_platform.device_name}, valid is its CPU "
            "back end"
        )
    llm = LLM(
        model=task.model,
        kv_policy=task.kv_policy,
        skip_tokenizer_init=True,
        **task.engine_args,
    )
    if has_policy:
        llm.collective_rpc("record_kv_policy")
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=task.max_tokens,
        stop_token_ids=task.stop_ids,
        detokenize=False,
    )
    prompt = {"prompt_token_ids": task.prompt_ids}
    (output,) = llm.generate([prompt], sampling, use_tqdm=False)
    held = None
    if has_policy:
        (record,) = llm.collective_rpc("kv_policy_record")
        (held,) = record["held"].values()
    llm.llm_engine.engine_core.shutdown()
    return EngineResult(list(output.outputs[0].token_ids), held)


if __name__ == "__main__":
    try:
        tell("result", asdict(inspect_request(EngineTask(**read_task()))))
    except KVPolicyError as error:
        tell("error", str(error))
    leave()
