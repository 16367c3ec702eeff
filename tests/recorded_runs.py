"""Runs of ``tests.recorded``, each in a process of its own.

``python -m tests.recorded_runs NAME JSON`` runs a function once for each of a list of
arguments, and writes what it returned, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.worker import warmup
from tests.recorded import Launches, Peaks, RecordedWorker, recorded_side
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


def sweep(
    model: str, policy: dict[str, Any], dtype: str, is_quantized: bool
) -> dict[str, Any]:
    """Warm up, then run every length under every policy.

    Returns:
        ``new``: kernels that requests would have compiled; ``without``: how many,
        were a part of the warm-up taken out.
    """
    launches = Launches()
    launches.install()
    config = make_config(model, policy, dtype=dtype, **SETTINGS)
    scheduler, worker = recorded_side(config, 60000, is_quantized)

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


def memory(
    model: str,
    policy: dict[str, Any],
    settings: dict[str, Any],
    requests: list[tuple[int, int, int]],
    num_blocks: int = 60000,
    cut: int | None = None,
    fault: str | None = None,
) -> dict[str, Any]:
    """Run some requests; what buffers held at most, and what was counted for them.

    Args:
        model: its folder.
        policy: of the engine.
        settings: of the engine.
        requests: of each its prompt, its output and the tokens that it shares.
        num_blocks: pages of the pool.
        cut: tokens of a chunk, as where encoder inputs end it early.
        fault: what to take out: ``limits`` or ``parts``.
    """
    Launches().install()
    config = make_config(model, policy, **(SETTINGS | settings))
    scheduler, worker = recorded_side(config, num_blocks)
    if cut is not None:
        scheduler._reserve_prefill_lookahead = lambda _, __, num_new: min(cut, num_new)
    if fault == "limits":
        scheduler._pages.in_flight.admits = lambda *_: True
    if fault == "parts":
        worker.state.max_scores = 1 << 30
    peaks, driver = Peaks(worker), Driver(scheduler, worker=worker)
    for i, (prompt, output, shared) in enumerate(requests):
        request = make_request(str(i), prompt, output, shared=shared)
        scheduler.add_request(request)
        if i == 0 and shared:
            driver.step()  # others find its pages
    most_scores = 0
    while scheduler.has_requests():
        plan = driver.step()
        peaks.look()
        tokens = sum(window.num_tokens for window in plan.windows)
        most_scores = max(most_scores, tokens)
    counted = worker.worker.prompt_buffers()
    return {
        "peaks": peaks.found | {"tokens": most_scores},
        "counted": {
            "requests": counted.limits.max_at_once,
            "held": counted.held(),
            "scores": counted.scores(),
            "gathered": counted.gathered(),
            "normalizers": counted.normalizers(),
            "tokens": counted.limits.max_scores,
        },
        "max_cut": counted.limits.max_cut,
    }


RUNS: dict[str, Callable[..., dict[str, Any]]] = {"sweep": sweep, "memory": memory}


def main() -> None:
    found = [RUNS[sys.argv[1]](**arguments) for arguments in json.loads(sys.argv[2])]
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
