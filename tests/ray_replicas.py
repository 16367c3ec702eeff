"""Two engines that Ray starts, as a program beside the cluster.

Reads its settings as JSON; writes what they answered and what every worker says.
"""

import asyncio
import json
import sys
from typing import Any

from tests.engines import random_prompts


async def answer(engine: Any, name: str, prompt: list[int], max_tokens: int) -> Any:
    """The greedy output of one prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )
    result = None
    async for output in engine.generate({"prompt_token_ids": prompt}, sampling, name):
        result = list(output.outputs[0].token_ids)
    return result


async def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Send all prompts at once; vLLM distributes them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings["engine"]))
    try:
        prompts = random_prompts(settings["lengths"])
        tokens = await asyncio.gather(
            *(
                answer(engine, str(index), prompt, settings["max_tokens"])
                for index, prompt in enumerate(prompts)
            )
        )
        workers = await engine.engine_core.call_utility_all_async(
            "collective_rpc", "kv_policy_stats", None, (), None
        )
    finally:
        engine.shutdown()
    return {"tokens": tokens, "workers": workers}


def main() -> None:
    settings = json.load(sys.stdin)
    print("@" + json.dumps(asyncio.run(run(settings))), flush=True)


if __name__ == "__main__":
    main()
