"""A server and vLLM's own client, ``vllm bench serve``."""

import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyramid_vllm.tools.bench.figures import online_figures
from pyramid_vllm.tools.bench.ranges import TokenRange
from pyramid_vllm.tools.bench.server import (
    Sampler,
    as_flags,
    complete,
    parse_activation,
    serve,
    tail,
    vllm_script,
)
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.bench.workload import Point, Workload, engine_args
from pyramid_vllm.tools.figures import PERCENTILES, Figures
from pyramid_vllm.tools.sides import Side

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
    """Check what server and client need; ``ValueError`` if it is not installed."""
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
        "ignore_eos": True,
        "disable_tqdm": True,
        "save_result": True,
        "save_detailed": True,
        **(_CUSTOM if settings.text else _random(settings)),
    }
    return OnlineTask(
        model=str(settings.model),
        server_arguments=as_flags(engine_args(settings, workload, point, side)),
        client_arguments=as_flags(client),
        dataset=_lines(settings, workload) if settings.text else None,
        warm_up_tokens=min(workload.requests.prompt_lengths),
    )


#: The client reads our requests from a file.
_CUSTOM = {
    "dataset_name": "custom",
    "custom_output_len": -1,
    "skip_chat_template": True,
    "disable_shuffle": True,
}


def _random(settings: BenchSettings) -> dict[str, Any]:
    """The client draws requests: of each length it wants a middle and a share of it."""

    def middle(lengths: TokenRange) -> int:
        return (lengths.low + lengths.high) // 2

    def ratio(lengths: TokenRange) -> float:
        # A trace less, so that rounding does not widen the range.
        return max(0.0, (middle(lengths) - lengths.low) / middle(lengths) - 1e-9)

    prompt, output = settings.prompt_range, settings.output_range
    return {
        "dataset_name": "random",
        "random_prefix_len": settings.shared_prefix,
        "random_input_len": middle(prompt),
        "random_output_len": middle(output),
        "random_range_ratio": {"input": ratio(prompt), "output": ratio(output)},
    }


def _lines(settings: BenchSettings, workload: Workload) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    (prompts,) = workload.requests.turns
    return [
        {"prompt": tokenizer.decode(prompt), "output_tokens": length}
        for prompt, length in zip(
            prompts, workload.requests.output_lengths, strict=True
        )
    ]


def run_online(
    task: OnlineTask, advance: Callable[[int], None]
) -> tuple[Figures, dict[str, Any]]:
    """Start a server, put the load on it, read both sides' figures.

    Returns:
        The figures, and those of each request as the client has them.

    Raises:
        RuntimeError: the server or the client failed, or a request did.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        log = folder / "server.log"
        with serve(task.model, task.server_arguments, log) as url:
            # No request begins with this prompt of one token, repeated. The second
            # time, its pages come from the prefix cache where that is on.
            for _ in range(2):
                complete(url, task.model, [0] * task.warm_up_tokens, 2)
            with Sampler(url, advance) as sampler:
                result = _load(task, url, folder)
            server = sampler.figures()
        text = log.read_text(encoding="utf-8", errors="replace")
    raw = {key: result[key] for key in _RAW if key in result}
    raw["prefix_caching"] = sampler.is_caching
    return online_figures(result, server | parse_activation(text)), raw


def _load(task: OnlineTask, url: str, folder: Path) -> dict[str, Any]:
    command = [vllm_script(), "bench", "serve", "--base-url", url]
    command += [*task.client_arguments, "--result-dir", str(folder)]
    command += ["--result-filename", "result.json"]
    if task.dataset is not None:
        file = folder / "requests.jsonl"
        lines = map(json.dumps, task.dataset)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command += ["--dataset-path", str(file)]
    log, result = folder / "client.log", folder / "result.json"
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=output, check=False)
    if done.returncode != 0 or not result.is_file():
        raise RuntimeError(f"vllm bench serve failed:\n{tail(log)}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
