"""Answers to a file of prompts: vLLM engines with a KV policy, run by Ray Data.

A job that was stopped, or killed, is started again with the same options: it does only
the rows that its output lacks.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from engines import (
    AddressOption,
    Device,
    DeviceOption,
    EngineOption,
    ModelOption,
    PolicyConfigOption,
    PolicyOption,
    engine_kwargs,
    find_device,
    start_ray,
)
from rich.console import Console
from rows import Answers, Row, bundled_rows, kind_of, read_rows

from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.options import or_fail

#: GPUs by this one line, or by ``--device gpu``.
DEVICE = "cpu"
#: Of the stages beside the engines: with Ray's default of one each, a machine of two
#: cores has none left for the engine, and the job waits for ever.
STAGE_CPUS = 0.25
_ERROR = "__inference_error__"
_PROGRESS_S = 2.0


@dataclass(frozen=True)
class Job:
    """What every row of a job has in common."""

    model: str
    device: Device
    engine_kwargs: dict[str, Any]
    sampling: dict[str, Any]
    num_engines: int
    batch_size: int
    max_restarts: int
    address: str | None


def make_processor(job: Job, kind: str) -> Any:
    """Ray Data's stages for rows of one kind."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    sampling, stage = job.sampling, {"num_cpus": STAGE_CPUS}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=job.model,
            engine_kwargs=job.engine_kwargs,
            placement_group_config={"bundle_per_worker": job.device.bundle},
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
    # Ray Data's default is without end: a prompt that kills its engine would kill
    # engines for ever.
    processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs.update(
        max_restarts=job.max_restarts, max_task_retries=job.max_restarts
    )
    return processor


def answers(job: Job, rows: list[Row]) -> Iterator[Row]:
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
        for row in make_processor(job, kind_of(rows[0]))(dataset).iter_rows():
            error = row.pop(_ERROR)
            yield {"id": row["id"], "error": error} if error else row
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"Ray ended the job, see its log above: {reason}") from error
    finally:
        ray.shutdown()


def run(job: Job, rows: list[Row], output: Path, console: Console) -> int:
    """Answer the rows that the output lacks.

    Returns:
        How many are still missing.
    """
    with Answers(output) as done:
        missing = [row for row in rows if row["id"] not in done.ids]
        num_done = len(rows) - len(missing)
        console.print(f"{num_done} of {len(rows)} rows are there")
        next_line = 0.0
        for row in answers(job, missing) if missing else ():
            if "error" in row:
                console.print(f"row {row['id']!r}: {row['error']}", markup=False)
            else:
                num_done += done.add(row)
            if num_done == len(rows) or time.monotonic() > next_line:
                console.print(f"{num_done} of {len(rows)} rows")
                next_line = time.monotonic() + _PROGRESS_S
        return len(rows) - num_done


def main(
    output: Annotated[Path, typer.Argument(help="File of JSON lines; it is added to.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="JSON lines, each with an 'id' and either 'messages' or a 'prompt'. "
            "Default: bundled ones.",
        ),
    ] = None,
    model: ModelOption = None,
    kv_policy: PolicyOption = "pyramid",
    kv_policy_config: PolicyConfigOption = None,
    device: DeviceOption = DEVICE,
    engines: Annotated[int, typer.Option(min=1, help="Engines at once.")] = 1,
    engine_args: EngineOption = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows that are done again if an engine dies.")
    ] = 8,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Times that an engine which died is replaced.")
    ] = 3,
    address: AddressOption = None,
) -> None:
    """Answer prompts; exit status 1 if rows are missing at the end."""
    kind = or_fail(lambda: find_device(device))
    rows = or_fail(lambda: bundled_rows() if prompts is None else read_rows(prompts))
    settings = or_fail(
        lambda: engine_kwargs(kind, kv_policy, kv_policy_config, engine_args)
    )
    job = Job(
        model=model or or_fail(lambda: str(make_model())),
        device=kind,
        engine_kwargs=settings,
        sampling={"max_tokens": max_tokens, "temperature": temperature},
        num_engines=engines,
        batch_size=batch_size,
        max_restarts=max_restarts,
        address=address,
    )
    console = Console(highlight=False)
    num_missing = or_fail(lambda: run(job, rows, output, console))
    if num_missing:
        console.print(f"{num_missing} rows are missing: start the same command again")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
