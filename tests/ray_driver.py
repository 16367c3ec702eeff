"""One engine on two Ray nodes, as a program beside the cluster.

Reads its settings as JSON; writes what the engine answered and what its workers say.
"""

import json
import os
import sys
from typing import Any

# The engine's core in this process: the workers alone are elsewhere.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from tests.engines import close, make_llm, random_prompts, scheduler_of


def answer(
    llm: Any, lengths: list[int], wishes: list[str], max_tokens: int
) -> dict[str, list[list[int]]]:
    """Greedy outputs of random prompts under each policy, all in one batch."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": p} for p in random_prompts(lengths)]
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_policy": wish},
        )
        for wish in wishes
        for _ in prompts
    ]
    outputs = llm.generate(prompts * len(wishes), sampling, use_tqdm=False)
    tokens = iter([list(output.outputs[0].token_ids) for output in outputs])
    return {wish: [next(tokens) for _ in prompts] for wish in wishes}


def where_is(worker: Any) -> dict[str, str]:
    """The node of a worker, called inside it."""
    import ray
    from vllm.platforms import current_platform

    context = ray.get_runtime_context()
    return {
        "node": context.get_node_id(),
        "actor": context.get_actor_id(),
        "platform": type(current_platform).__name__,
    }


def main() -> None:
    settings = json.load(sys.stdin)
    from vllm.platforms import current_platform

    from pyramid_vllm.ray import CPURayExecutor

    llm = make_llm(
        settings["model"],
        tensor_parallel_size=2,
        distributed_executor_backend=CPURayExecutor,
        **settings["policy"],
    )
    result = {
        "device_key": current_platform.ray_device_key,
        "tokens": answer(llm, **settings["load"]),
        "workers": llm.collective_rpc("kv_policy_stats"),
        "places": llm.collective_rpc(where_is),
        "pages_freed": scheduler_of(llm).kv_counters.num_pages_freed,
    }
    print("@" + json.dumps(result), flush=True)
    close(llm)


if __name__ == "__main__":
    main()
