"""A client of Ray Serve, beside a test's cluster: one chat, and what workers did.

Reads JSON: ``base_url``, ``model``, ``prompt``, ``max_tokens``, ``max_retries`` and
``start_up_s``, how long to wait for the application first. Writes JSON after an "@".
"""

import json
import sys
import time
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


def wait_until_it_runs(seconds: float) -> None:
    """Return once all replicas are up.

    Raises:
        RuntimeError: they are not in time; says what Ray Serve says of them.
    """
    from ray import serve

    deadline = time.monotonic() + seconds
    while True:
        application = serve.status().applications.get(APPLICATION)
        if application is not None and application.status == "RUNNING":
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"not running: {application}")
        time.sleep(0.5)


def worker_stats(model: str) -> list[dict[str, Any]]:
    """``kv_policy_stats`` of the replica's workers, read through Ray."""
    from ray import serve

    handle = serve.get_deployment_handle(ENGINE + model, APPLICATION)
    response = handle.collective_rpc.remote("kv_policy_stats")
    found: list[dict[str, Any]] = response.result(timeout_s=60)
    return found


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Answer the request that standard input holds."""
    import ray

    ray.init(logging_level="ERROR")
    if request["start_up_s"]:
        wait_until_it_runs(request["start_up_s"])
    answer = chat(request)
    return {"answer": answer, "stats": worker_stats(request["model"])}


if __name__ == "__main__":
    print("@" + json.dumps(main(json.load(sys.stdin))))
