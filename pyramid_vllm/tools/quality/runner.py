"""One policy, one process: runs jobs through vLLM."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from pyramid_vllm.policy import RETENTION_ARG
from pyramid_vllm.tools.quality.activity import ActivityWatch
from pyramid_vllm.tools.quality.distributions import FullRows, PolicyRows
from pyramid_vllm.tools.quality.forcing import FORCED_ARG, OBSERVER_ARG, ForcedTokens
from pyramid_vllm.tools.quality.jobs import Job, JobResult, Request


def run_jobs(task: dict[str, Any], send: Callable[[str, Any], None]) -> None:
    """Run the jobs of ``run_engine`` in this process; send a result for each job."""
    engine = make_engine(task["llm_args"])
    has_policy, before = task["llm_args"].get("kv_policy") is not None, 0
    for job in [Job(**given) for given in task["jobs"]]:
        send("done", before)

        def progress(done: int, before: int = before) -> None:
            send("done", before + done)

        send("result", asdict(run_job(engine, job, has_policy, progress)))
        before += len(job.requests)


def make_engine(llm_args: dict[str, Any]) -> Any:
    """A vLLM engine in this process, so that its logits can be seen."""
    llm = LLM(skip_tokenizer_init=True, logits_processors=[ForcedTokens], **llm_args)
    return llm.llm_engine


def run_job(
    engine: Any, job: Job, has_policy: bool, progress: Callable[[int], None]
) -> JobResult:
    """Run a job's requests at once, greedily.

    Args:
        engine: from ``make_engine``.
        job: the requests.
        has_policy: whether the engine has one; else it is the full cache.
        progress: gets the number of finished requests after every step.

    Raises:
        RuntimeError: an output is not the one that was forced.
    """
    observers = _observers(job, has_policy)
    ForcedTokens.observers |= {name: rows.see for name, rows in observers.items()}
    watch = ActivityWatch(engine.engine_core.engine_core.scheduler)
    for index, request in enumerate(job.requests):
        prompt = {"prompt_token_ids": request.prompt_ids}
        engine.add_request(str(index), prompt, _sampling(request, job, str(index)))
    finished: dict[str, Any] = {}
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0]
        watch.step()
        progress(len(finished))
    ForcedTokens.observers.clear()
    completions = [finished[str(index)] for index in range(len(job.requests))]
    return JobResult(
        outputs=[list(completion.token_ids) for completion in completions],
        logprobs=list(map(_forced_logprobs, job.requests, completions)),
        rows=[observer.result() for observer in observers.values()],
        activity=watch.result(),
        seconds=time.perf_counter() - start,
    )


def _observers(job: Job, has_policy: bool) -> dict[str, Any]:
    if job.rows_dir is None:
        return {}
    kind = PolicyRows if has_policy else FullRows
    return {
        str(index): kind(Path(job.rows_dir) / f"{index}.npy", len(request.forced))
        for index, request in enumerate(job.requests)
        if request.forced is not None
    }


def _sampling(request: Request, job: Job, name: str) -> Any:
    extra: dict[str, Any] = {}
    if job.retention is not None:
        extra[RETENTION_ARG] = job.retention
    if request.forced is not None:
        extra |= {FORCED_ARG: request.forced, OBSERVER_ARG: name}
    return SamplingParams(
        temperature=0.0,
        max_tokens=request.max_tokens,
        ignore_eos=True,
        stop_token_ids=request.stop_ids,
        logprobs=None if request.forced is None else 0,
        detokenize=False,
        # A hit would leave more of a prompt whole than its policy keeps.
        skip_reading_prefix_cache=True,
        extra_args=extra or None,
    )


def _forced_logprobs(request: Request, completion: Any) -> list[float]:
    if request.forced is None:
        return []
    tokens = list(completion.token_ids)
    if tokens != request.forced:
        raise RuntimeError(f"the output is {tokens}, forced was {request.forced}")
    steps = zip(tokens, completion.logprobs, strict=True)
    return [float(step[token].logprob) for token, step in steps]
