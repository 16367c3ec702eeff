"""One request, one process: runs it and reads what the cache then holds."""

from collections.abc import Callable
from typing import Any

from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.tools.engine_process import PASSIVE, run_job

#: Positions of tokens by layer and KV head; None: stock vLLM, which keeps all.
Held = list[list[list[int]]] | None


def run_engine(**task: Any) -> tuple[list[int], Held]:
    """``inspect_request`` in a process of its own.

    Raises:
        KVPolicyError: the engine refused the policy.
        RuntimeError: the process failed; the message ends with its last lines.
    """
    results: list[Any] = []
    run_job(f"{__name__}:job", task, results.append, environment=PASSIVE)
    output_ids, held = results[0]
    return output_ids, held


def job(task: dict[str, Any], send: Callable[[str, Any], None]) -> None:
    """Run the task in this process and send its result."""
    send("result", inspect_request(**task))


def inspect_request(
    model: str,
    kv_policy: str | None,
    prompt_ids: list[int],
    max_tokens: int,
    stop_ids: list[int],
    engine_args: dict[str, Any],
) -> tuple[list[int], Held]:
    """Run a request in an engine of this process: its output, and what it holds.

    Raises:
        KVPolicyError: the set-up is not one that a record follows.
    """
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if kv_policy is not None and not current_platform.is_cpu():
        raise KVPolicyError(
            "inspect does not support kernels, which do not say which tokens they "
            f"chose: vLLM runs on {current_platform.device_name}, valid is its CPU "
            "back end"
        )
    llm = LLM(model, kv_policy=kv_policy, skip_tokenizer_init=True, **engine_args)
    if kv_policy is not None:
        llm.collective_rpc("record_kv_policy")
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        stop_token_ids=stop_ids,
        detokenize=False,
    )
    prompt = {"prompt_token_ids": prompt_ids}
    (output,) = llm.generate([prompt], sampling, use_tqdm=False)
    held = None
    if kv_policy is not None:
        (record,) = llm.collective_rpc("kv_policy_record")
        (held,) = record["held"].values()
    llm.llm_engine.engine_core.shutdown()
    return list(output.outputs[0].token_ids), held
