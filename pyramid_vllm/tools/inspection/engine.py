"""One request, one process: runs it and reads what the cache then holds."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.tools.engine_process import PASSIVE, run_job


@dataclass(frozen=True)
class EngineTask:
    """The request and its engine."""

    model: str
    kv_policy: str | None
    prompt_ids: list[int]
    max_tokens: int
    stop_ids: list[int]
    engine_args: dict[str, Any]


@dataclass(frozen=True)
class EngineResult:
    """Output of a request, and the tokens that its cache holds."""

    output_ids: list[int]
    held: list[list[list[int]]] | None
    """Positions by layer and KV head; None: stock vLLM, which keeps all."""


def run_engine(task: EngineTask) -> EngineResult:
    """Run a task in a process of its own.

    Raises:
        KVPolicyError: the engine refused the policy.
        RuntimeError: the process failed; the message ends with its last lines.
    """
    results: list[Any] = []
    run_job(f"{__name__}:job", asdict(task), results.append, environment=PASSIVE)
    return EngineResult(**results[0])


def job(task: dict[str, Any], send: Callable[[str, Any], None]) -> None:
    """Run the task in this process and send its result."""
    send("result", asdict(inspect_request(EngineTask(**task))))


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
