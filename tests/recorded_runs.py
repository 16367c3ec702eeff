"""Runs of ``tests.recorded``, each in a process of its own.

``python -m tests.recorded_runs NAME JSON`` writes what the run found, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.worker import warmup
from tests.recorded import Launches, RecordedWorker, recorded_side
from tests.scheduling import Driver, make_config, make_request

LENGTHS = (1, 40, 129, 1025, 4097, 16385, 40000)
RETENTIONS = (None, 0.3)
#: Large enough for the longest prompt of the sweep.
SETTINGS: dict[str, Any] = {
    "hf_overrides": {"max_position_embeddings": 65536},
    "max_model_len": 45056,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 64,
}


def extra_args(worker: RecordedWorker) -> list[dict[str, Any]]:
    """What requests may ask for."""
    policies, found = worker.policies, []
    for name in policies.valid:
        for retention in RETENTIONS:
            wanted = {"kv_policy": name}
            if retention is not None:
                wanted["kv_retention"] = retention
            try:
                policies.rule_for(wanted)
            except KVPolicyError:
                continue
            found.append(wanted)
    return found


def _without(worker: RecordedWorker) -> dict[str, tuple[Any, str, Any]]:
    """Attributes that take a part out of the warm-up."""
    state, none, own = worker.state, lambda *_: None, warmup._WarmUp
    server = worker.policies.server
    return {
        "other policies": (state, "policies", {server.name: server}),
        "small blocks of queries": (warmup, "_ROWS", (64,)),
        "long prompts": (warmup, "_TOKENS", (1,)),
        "lengths": (own, "lengths", none),
        "scores": (own, "score", none),
        "choice": (own, "choose", none),
        "rows": (own, "rows", none),
        "generated": (own, "generated", none),
    }


def sweep(model: str, policy: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Warm up, then run every length under every policy.

    Returns:
        ``new``: kernels that requests would have compiled; ``without``: how many,
        were a part of the warm-up taken out.
    """
    launches = Launches()
    launches.install()
    config = make_config(model, policy, dtype=dtype, **SETTINGS)
    scheduler, worker = recorded_side(config, 60000)

    def warm() -> set[tuple[str, str]]:
        kinds = worker.worker._query_kinds()
        warmup.compile_kernels(worker.worker._groups, worker.state, kinds)
        return launches.take()

    known = warm()
    driver = Driver(scheduler, worker=worker)
    wanted = extra_args(worker)
    for length in LENGTHS:
        output = 60 if length < 200 else 3
        for i, extra in enumerate(wanted):
            name = f"{length}-{i}"
            request = make_request(name, length, output, extra_args=extra)
            scheduler.add_request(request)
        driver.run()
    seen, without = launches.take(), {}
    for part, (owner, name, value) in _without(worker).items():
        with mock.patch.object(owner, name, value):
            without[part] = len(seen - warm())
    return {
        "policies": sorted({extra["kv_policy"] for extra in wanted}),
        "kernels": sorted({name for name, _ in seen}),
        "new": sorted(name for name, _ in seen - known),
        "without": without,
        "finished": len(driver.finished) == len(wanted) * len(LENGTHS),
    }


RUNS: dict[str, Callable[..., dict[str, Any]]] = {"sweep": sweep}


def main() -> None:
    print("\n" + json.dumps(RUNS[sys.argv[1]](**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
