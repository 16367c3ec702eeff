"""Engines with the policy are compared with stock ones, on a tiny random model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

from gpu_check.loading import need, need_gpu
from gpu_check.pieces import FAILED, MEASURED, OK, SKIPPED, Check, Options

#: Attention backends and their most exact dtypes.
BACKENDS = {"TRITON_ATTN": "float32", "FLASH_ATTN": "float16", "FLASHINFER": "float16"}
#: Differences of log probabilities that rounding explains.
_ROUNDING = {"float32": 2e-3, "float16": 5e-2}
#: The same for differences from the oracle, which computes in float64.
_ORACLE_ROUNDING = 1e-3
#: A head size that all backends have.
_HEAD_SIZE = 64
_POLICY = {
    "tiers": 3,
    "retention": 0.4,
    "recent": 24,
    "queries": 40,
    "query_ratio": 0.2,
    "min_context": 40,
}
_ON = {"kv_policy": "pyramid", "kv_policy_config": _POLICY}
SIDES: dict[str, dict[str, Any]] = {
    # This side runs first: on the CPU, graphs stay on once they are on.
    "eager": _ON | {"enforce_eager": True},
    # This side is not compiled, so it computes prompts and chooses tokens as eagerly.
    "graphs": _ON
    | {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "stock": {},
    "retention 1": _ON
    | {"kv_policy_config": _POLICY | {"retention": 1.0, "min_context": 0}},
    # Users run this side: compiled, and with vLLM's own choice of graphs.
    "default": _ON,
}
_SIDE_TIMEOUT = 900.0


def run(options: Options) -> Iterator[Check]:
    """Run backend by backend. On a GPU each engine has a process of its own."""
    need("torch", "vllm", "transformers")
    if not options.on_cpu:
        need_gpu()
    names = ["TRITON_ATTN"] if options.on_cpu else list(BACKENDS)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            yield from _backend(name, folder, options)


def _task(backend: str, folder: str, options: Options) -> dict[str, Any]:
    dtype, sides = BACKENDS[backend], dict(SIDES)
    if options.on_cpu:
        del sides["default"]  # nothing is compiled there
    lengths = [1, 5, 17, 33, 64, 100, 129, 200, 333, 512, 700]
    return {
        "folder": folder,
        "num_layers": 3 if options.on_cpu else 6,
        "head_size": _HEAD_SIZE,
        "backend": backend,
        "dtype": dtype,
        "sides": sides,
        "lengths": [5, 70] if options.on_cpu else lengths,
        "num_tokens": 5 if options.on_cpu else 48,
        "on_cpu": options.on_cpu,
        "oracles": ["graphs", "default"] if dtype == "float32" else [],
        "seed": options.seed,
    }


def _results(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results of every side; a side that fails has its error."""
    from pyramid_vllm.tools.engine_process import run_child

    sides = task["sides"]
    parts = [sides] if task["on_cpu"] else [{name: sides[name]} for name in sides]
    results: dict[str, dict[str, Any]] = {}
    for part in parts:
        try:
            run_child(
                "gpu_check.engine_job",
                task | {"sides": part},
                lambda message: results.update(message["result"]),
                os.environ,
                num_results=len(part),
                timeout=_SIDE_TIMEOUT * len(part),
            )
        except RuntimeError as error:
            for name in part:
                results.setdefault(name, {"error": str(error)})
    return results


def _backend(backend: str, folder: str, options: Options) -> Iterator[Check]:
    """All comparisons of one backend."""
    task = _task(backend, folder, options)
    results = _results(task)
    stock = results["stock"]
    if "error" in stock:
        # Without stock vLLM there is nothing to compare with.
        why = f"stock vLLM does not run: {stock['error'].strip().splitlines()[-1]}"
        yield Check(backend, SKIPPED, why, {"error": stock["error"]})
        return
    for name, result in results.items():
        if "error" in result:
            error = result["error"]
            last = error.strip().splitlines()[-1]
            yield Check(f"{backend}, {name}", FAILED, last, {"error": error})
        else:
            engine = result["engine"]
            detail = ", ".join(engine.values()).removeprefix("vllm.v1.worker.")
            yield Check(f"{backend}, {name}", MEASURED, detail, engine)
    good = {name: result for name, result in results.items() if "error" not in result}
    yield from _comparisons(backend, good, _ROUNDING[task["dtype"]])


def _comparisons(
    backend: str, results: dict[str, dict[str, Any]], rounding: float
) -> Iterator[Check]:
    if "retention 1" in results:
        name = f"{backend}, retention 1 is stock"
        yield identical(name, results["retention 1"], results["stock"])
    for side in ("graphs", "default"):
        if side not in results:
            continue
        name = f"{backend}, {side}: the policy acts"
        yield acted(name, results[side], results["stock"])
        if "oracle" in results[side]:
            name = f"{backend}, {side}: the oracle"
            yield beside_oracle(name, results[side]["oracle"])
    if {"graphs", "eager"} <= results.keys():
        name = f"{backend}, graphs are eager"
        yield alike(name, results["graphs"], results["eager"], rounding)


def identical(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Check:
    """Every token is the same, although the policy is on; it evicts nothing."""
    pairs = zip(ours["tokens"], theirs["tokens"], strict=True)
    same = [a == b for a, b in pairs]
    counters = ours["counters"]
    figures = {"num_same": sum(same), "num_requests": len(same), "counters": counters}
    detail = f"{sum(same)} of {len(same)} requests have the same tokens"
    if counters is None or theirs["counters"] is not None:
        return Check(name, FAILED, "the policy is not on on one side alone", figures)
    if counters["num_evicted_tokens"]:
        return Check(name, FAILED, "something was evicted", figures)
    return Check(name, OK if all(same) else FAILED, detail, figures)


def acted(name: str, ours: dict[str, Any], stock: dict[str, Any]) -> Check:
    """The policy acted, by its counters and by the probabilities of tokens."""
    engine = ours["engine"]
    if not engine["attention"].startswith("Pyramid") or engine["graphs"] == "NONE":
        detail = f"attention {engine['attention']}, graphs {engine['graphs']}"
        return Check(name, FAILED, detail)
    counters = ours["counters"] or {}
    keys = ("num_compactions", "num_pages_freed", "num_evicted_tokens")
    counts = {key: counters.get(key, 0) for key in keys}
    changed = ours["logprobs"] != stock["logprobs"]
    detail = ", ".join(f"{key} {value}" for key, value in counts.items())
    detail += "" if changed else "; but nothing differs from stock"
    good = all(counts.values()) and changed
    return Check(name, OK if good else FAILED, detail, {"counters": counters})


def alike(
    name: str, ours: dict[str, Any], theirs: dict[str, Any], rounding: float
) -> Check:
    """Tokens are the same until two tokens are as likely but for rounding.

    Graphs pad batches of generated tokens, which then round differently.
    """
    num_same, worst = 0, 0.0
    sides = (ours["tokens"], theirs["tokens"], ours["logprobs"], theirs["logprobs"])
    for tokens, others, logprobs, their_logprobs in zip(*sides, strict=True):
        pairs = zip(tokens, others, strict=True)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
        num_same += first == len(tokens)
        # Up to the first difference, both had read the same tokens.
        both = zip(logprobs[: first + 1], their_logprobs[: first + 1], strict=True)
        worst = max([worst, *(abs(a - b) for a, b in both)])
    detail = (
        f"{num_same} of {len(ours['tokens'])} requests have the same tokens, log "
        f"probabilities differ by {worst:.2g}; limit: {rounding:g}"
    )
    figures = {"num_same": num_same, "max_difference": worst, "limit": rounding}
    return Check(name, OK if worst <= rounding else FAILED, detail, figures)


def beside_oracle(name: str, found: list[dict[str, Any]]) -> Check:
    """Compare with the oracle. Requests whose selection depends on rounding are left
    out; they have to be few."""
    decided = [request for request in found if request["decided"]]
    figures = {"requests": found, "limit": _ORACLE_ROUNDING}
    if len(decided) < max(1, len(found) - 4):
        why = f"only {len(decided)} of {len(found)} requests do not hang on rounding"
        return Check(name, FAILED, why, figures)
    worst = max(max(one["max_gap"], one["max_error"]) for one in decided)
    detail = (
        f"{len(decided)} of {len(found)} requests compared, log probabilities differ "
        f"by {worst:.2g}; limit: {_ORACLE_ROUNDING:g}"
    )
    return Check(name, OK if worst <= _ORACLE_ROUNDING else FAILED, detail, figures)
