"""A server and vLLM's own client, ``vllm bench serve``."""

import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyramid_vllm.tools.bench.figures import PERCENTILES, online_figures
from pyramid_vllm.tools.bench.server import (
    Sampler,
    as_flags,
    complete,
    parse_activation,
    parse_prefix_caching,
    read_metrics_text,
    serve,
    tail,
    vllm_script,
)
from pyramid_vllm.tools.bench.settings import BenchSettings, Side, TokenRange
from pyramid_vllm.tools.bench.store import PREFIX_CACHING, RunResult
from pyramid_vllm.tools.bench.workload import Point, Workload

_RAW = ("start_times", "ttfts", "itls", "input_lens", "output_lens")


@dataclass(frozen=True)
class OnlineTask:
    """What one server and its client run."""

    model: str
    server_arguments: list[str]
    client_arguments: list[str]
    dataset: list[dict[str, Any]] | None
    """Lines of the client's file; None: it draws the requests."""
    warm_up_tokens: int
    """Length of the prompt that is answered first, uncounted."""


def check_online(settings: BenchSettings) -> None:
    """Check what server and client need.

    Raises:
        ValueError: something is not installed.
    """
    vllm_script()
    if settings.text is not None and find_spec("pandas") is None:
        raise ValueError(
            "--text with --workload online needs pandas, by which vLLM's client reads "
            "its file: pip install pandas; valid without it is no --text"
        )


def online_task(
    settings: BenchSettings, workload: Workload, point: Point, side: Side
) -> OnlineTask:
    """What one run starts."""
    server = {
        "dtype": workload.dtype,
        "seed": settings.seed,
        "kv_cache_memory_bytes": point.kv_bytes,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "block_size": workload.block_size,
        "max_model_len": workload.max_model_len,
        "enforce_eager": workload.is_cpu,
    }
    server |= settings.engine_args
    if side.policy_json is not None:
        server["kv_policy"] = side.policy_json
    client = {
        "model": settings.model,
        "backend": "vllm",
        "num_prompts": settings.num_prompts,
        "seed": settings.seed,
        "request_rate": "inf" if point.request_rate is None else point.request_rate,
        # Its own warm-up sends the first prompt, which the prefix cache would keep.
        "num_warmups": 0,
        "ready_check_timeout_sec": 0,
        "temperature": 0,
        "percentile_metrics": "ttft,tpot,e2el",
        "metric_percentiles": ",".join(map(str, PERCENTILES)),
    }
    client |= _random(settings) if settings.text is None else _custom()
    flags = [*as_flags(client), "--ignore-eos", "--disable-tqdm"]
    dataset = None if settings.text is None else _lines(settings.model, workload)
    return OnlineTask(
        model=settings.model,
        server_arguments=as_flags(server),
        client_arguments=flags,
        dataset=dataset,
        warm_up_tokens=min(workload.requests.prompt_lengths),
    )


def _random(settings: BenchSettings) -> dict[str, Any]:
    """The client's own requests: it wants a middle and a share of it."""

    def ratio(lengths: TokenRange) -> float:
        middle = _middle(lengths)
        # A trace less, so that rounding does not widen the range.
        return max(0.0, (middle - lengths.low) / middle - 1e-9)

    return {
        "dataset_name": "random",
        "random_prefix_len": settings.shared_prefix,
        "random_input_len": _middle(settings.prompt_tokens),
        "random_output_len": _middle(settings.output_tokens),
        "random_range_ratio": {
            "input": ratio(settings.prompt_tokens),
            "output": ratio(settings.output_tokens),
        },
    }


def _middle(lengths: TokenRange) -> int:
    return (lengths.low + lengths.high) // 2


def _custom() -> dict[str, Any]:
    return {
        "dataset_name": "custom",
        "custom_output_len": -1,
        "skip_chat_template": True,
        "disable_shuffle": True,
    }


def _lines(model: str, workload: Workload) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    requests = workload.requests
    pairs = zip(requests.prompts, requests.output_lengths, strict=True)
    return [
        {"prompt": tokenizer.decode(prompt), "output_tokens": length}
        for prompt, length in pairs
    ]


def run_online(task: OnlineTask, advance: Callable[[int], None]) -> RunResult:
    """Start a server, put the load on it, read both sides' figures.

    Raises:
        RuntimeError: the server or the client failed, or a request did.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        log = folder / "server.log"
        with serve(task.model, task.server_arguments, log) as url:
            _warm_up(task, url)
            is_caching = parse_prefix_caching(read_metrics_text(url))
            with Sampler(url, advance) as sampler:
                result = _load(task, url, folder)
            server = sampler.figures()
        text = log.read_text(encoding="utf-8", errors="replace")
    raw = {key: result[key] for key in _RAW if key in result}
    raw[PREFIX_CACHING] = is_caching
    figures = online_figures(result, server | parse_activation(text))
    return RunResult(figures, raw)


def _warm_up(task: OnlineTask, url: str) -> None:
    """Have a prompt answered that no request begins like: one token, repeated.

    The second time, its pages come from the prefix cache where that is on.
    """
    for _ in range(2):
        complete(url, task.model, [0] * task.warm_up_tokens, 2)


def _load(task: OnlineTask, url: str, folder: Path) -> dict[str, Any]:
    command = [str(vllm_script()), "bench", "serve", "--base-url", url]
    command += [*task.client_arguments, "--save-result", "--save-detailed"]
    command += ["--result-dir", str(folder), "--result-filename", "result.json"]
    if task.dataset is not None:
        file = folder / "requests.jsonl"
        lines = map(json.dumps, task.dataset)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command += ["--dataset-path", str(file)]
    log = folder / "client.log"
    with log.open("wb") as output:
        status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    result = folder / "result.json"
    if status != 0 or not result.is_file():
        raise RuntimeError(f"vllm bench serve failed:\n{tail(log)}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
