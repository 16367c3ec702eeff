"""Answers to a file of prompts: vLLM engines with a KV policy, run by Ray Data.

A job that was stopped, or killed, is started again with the same options: it does only
the rows that its output lacks.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import engines
import typer
from engines import engine_kwargs, find_device, start_ray
from rich.console import Console
from rows import Answers, Row, bundled_rows, kind_of, read_rows

from pyramid_vllm.tools import options
from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.options import argument, command, option

#: Change this line for GPUs, or pass ``--device gpu``.
DEVICE = "cpu"
#: CPUs of each other stage. Ray's default is one, which leaves none for the engine on a
#: machine of two cores, so the job would wait for ever.
STAGE_CPUS = 0.25
_ERROR = "__inference_error__"
_PROGRESS_S = 2.0


@dataclass(frozen=True)
class Settings:
    """Answer prompts; exit status 1 if rows are missing at the end."""

    output: Path = argument("File of JSON lines; it is added to.")
    prompts: Path | None = option(
        None,
        "JSON lines, each with an 'id' and either 'messages' or a 'prompt'. Default: "
        "bundled ones.",
        "--input",
    )
    model: str | None = option(None, options.MODEL_NAME)
    kv_policy: str = option("pyramid", engines.POLICY)
    kv_policy_config: str | None = option(None, options.POLICY_OVERRIDES)
    device: str = option(DEVICE, engines.DEVICE)
    num_engines: int = option(1, "Engines at once.", "--engines", min=1)
    engine_args: str | None = option(None, engines.ENGINE_ARGS)
    max_tokens: int = option(64, min=1)
    temperature: float = option(0.0, min=0.0)
    batch_size: int = option(8, "Rows that are done again if an engine dies.", min=1)
    max_restarts: int = option(3, "Times that an engine which died is replaced.", min=0)
    address: str | None = option(None, engines.ADDRESS, envvar="RAY_ADDRESS")


def make_processor(job: Settings, kwargs: dict[str, Any], kind: str) -> Any:
    """Ray Data's stages for rows of one kind; ``kwargs`` are vLLM's engine's."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    stage = {"num_cpus": STAGE_CPUS}
    sampling = {"max_tokens": job.max_tokens, "temperature": job.temperature}
    bundle = find_device(job.device).bundle
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=job.model,
            engine_kwargs=kwargs,
            placement_group_config={"bundle_per_worker": bundle},
            concurrency=(job.num_engines, job.num_engines),
            batch_size=job.batch_size,
            chat_template_stage=stage | {"enabled": kind == "messages"},
            # The engine's own front end does both, in its actor.
            tokenize_stage=False,
            detokenize_stage=False,
            # One bad row, such as a prompt that is too long, fails alone.
            should_continue_on_error=True,
        ),
        preprocess=lambda row: row | {"sampling_params": sampling},
        postprocess=lambda row: {
            "id": row["id"],
            "answer": row["generated_text"],
            "num_prompt_tokens": row["num_input_tokens"],
            "num_answer_tokens": row["num_generated_tokens"],
        },
        preprocess_map_kwargs=stage,
        postprocess_map_kwargs=stage,
    )
    # Ray Data's default has no bound: a prompt that kills its engine would kill
    # engines for ever.
    processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs.update(
        max_restarts=job.max_restarts, max_task_retries=job.max_restarts
    )
    return processor


def answers(job: Settings, kwargs: dict[str, Any], rows: list[Row]) -> Iterator[Row]:
    """Rows with an ``answer`` or an ``error``, as batches of them are ready.

    Raises:
        RuntimeError: an engine cannot start, or died once more than it may.
    """
    import ray

    start_ray(job.address)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        # A block is what an engine is given, and given again if it dies.
        num_blocks = math.ceil(len(rows) / job.batch_size)
        dataset = ray.data.from_items(rows, override_num_blocks=num_blocks)
        processor = make_processor(job, kwargs, kind_of(rows[0]))
        for row in processor(dataset).iter_rows():
            error = row.pop(_ERROR)
            yield {"id": row["id"], "error": error} if error else row
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"Ray ended the job, see its log above: {reason}") from error
    finally:
        ray.shutdown()


def do_missing(
    job: Settings, kwargs: dict[str, Any], rows: list[Row], console: Console
) -> int:
    """Answer the rows that the output lacks.

    Returns:
        How many are still missing.
    """
    with Answers(job.output) as done:
        missing = [row for row in rows if row["id"] not in done.ids]
        num_done = len(rows) - len(missing)
        console.print(f"{num_done} of {len(rows)} rows are there")
        next_line = 0.0
        for row in answers(job, kwargs, missing) if missing else ():
            if "error" in row:
                console.print(f"row {row['id']!r}: {row['error']}", markup=False)
            else:
                num_done += done.add(row)
            if num_done == len(rows) or time.monotonic() > next_line:
                console.print(f"{num_done} of {len(rows)} rows")
                next_line = time.monotonic() + _PROGRESS_S
        return len(rows) - num_done


def run(job: Settings) -> None:
    """Check the job, then do it."""
    device = find_device(job.device)
    rows = bundled_rows() if job.prompts is None else read_rows(job.prompts)
    policy = job.kv_policy, job.kv_policy_config
    kwargs = engine_kwargs(device, *policy, job.engine_args)
    job = replace(job, model=job.model or str(make_model()))
    console = Console(highlight=False)
    if num_missing := do_missing(job, kwargs, rows, console):
        console.print(f"{num_missing} rows are missing: start the same command again")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(command(Settings, run))
