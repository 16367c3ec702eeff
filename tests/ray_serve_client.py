"""A client of Ray Serve, beside a test's cluster: one chat, and what workers did.

Reads JSON: ``base_url``, ``model``, ``prompt``, ``max_tokens``, ``max_retries`` and
``stats``, whether to ask the workers. Writes JSON behind an "@".
"""

import json
import sys
from typing import Any

from openai import OpenAI

#: As `configs/ray/serve.yaml` names the application, and Ray Serve an engine.
APPLICATION, ENGINE = "llm", "LLMServer:"


def chat(request: dict[str, Any]) -> str:
    """One answer, with the client's own retries."""
    client = OpenAI(
        base_url=request["base_url"],
        api_key="none",
        timeout=60,
        max_retries=request["max_retries"],
    )
    completion = client.chat.completions.create(
        model=request["model"],
        messages=[{"role": "user", "content": request["prompt"]}],
        max_tokens=request["max_tokens"],
        temperature=0,
    )
    return completion.choices[0].message.content or ""


def worker_stats(model: str) -> list[dict[str, Any]]:
    """``kv_policy_stats`` of the replica's workers, through Ray."""
    import ray
    from ray import serve

    ray.init(logging_level="ERROR")
    handle = serve.get_deployment_handle(ENGINE + model, APPLICATION)
    response = handle.collective_rpc.remote("kv_policy_stats")
    found: list[dict[str, Any]] = response.result(timeout_s=60)
    return found


if __name__ == "__main__":
    wish = json.load(sys.stdin)
    result = {"answer": chat(wish)}
    if wish["stats"]:
        result["stats"] = worker_stats(wish["model"])
    print("@" + json.dumps(result))
