"""``pyramid-vllm eval``: what policies keep of a model's quality."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from pyramid_vllm.tools.cli import eval_options as options
from pyramid_vllm.tools.cli.failing import or_fail

if TYPE_CHECKING:
    from pyramid_vllm.tools.quality.evaluation import Outcome
    from pyramid_vllm.tools.quality.report import Summary
    from pyramid_vllm.tools.quality.settings import EvalSettings
    from pyramid_vllm.tools.quality.tasks import Task

_Value = TypeVar("_Value")


def evaluate(
    model: options.Model = None,
    kv_policy: options.Policies = None,
    retention: options.Retentions = None,
    text: options.Text = None,
    text_from: options.TextFrom = 0.0,
    text_to: options.TextTo = 1.0,
    prompt_tokens: options.PromptTokens = 1024,
    target_tokens: options.TargetTokens = 128,
    windows: options.Windows = 8,
    agreement_tokens: options.AgreementTokens = 64,
    retrieval: options.Retrieval = None,
    retrieval_tokens: options.RetrievalTokens = None,
    depths: options.Depths = 5,
    samples: options.Samples = 4,
    gsm8k: options.Gsm8k = None,
    gsm8k_problems: options.Gsm8kProblems = 50,
    seed: options.Seed = 0,
    kv_memory: options.KVMemory = "2GiB",
    max_num_batched_tokens: options.MaxNumBatchedTokens = 0,
    dtype: options.Dtype = "auto",
    engine_args: options.EngineArgs = None,
    out: options.Out = Path("eval-results"),
) -> None:
    """Compare policies with the full cache: losses, retrieval, GSM8K, memory."""
    given = dict(locals())
    del given["out"]
    or_fail(lambda: run_eval(_settings(**given), out, Console()))


def _settings(
    model: str | None,
    kv_policy: list[str] | None,
    retention: list[float] | None,
    text: Path | None,
    retrieval: list[str] | None,
    retrieval_tokens: list[int] | None,
    gsm8k: Path | None,
    kv_memory: str,
    engine_args: str | None,
    **others: Any,
) -> "EvalSettings":
    """The options as the evaluation takes them."""
    from pyramid_vllm.tools.cli.model import make_model
    from pyramid_vllm.tools.json_settings import json_object
    from pyramid_vllm.tools.quality.settings import EvalSettings
    from pyramid_vllm.tools.sizes import parse_bytes

    return EvalSettings(
        kv_policies=_once(kv_policy, ["pyramid"]),
        retentions=_once(retention, []),
        text=None if text is None else str(text),
        retrieval=_retrieval_tasks(retrieval or ["all"]),
        retrieval_tokens=_once(retrieval_tokens, [1024]),
        gsm8k=None if gsm8k is None else str(gsm8k),
        kv_bytes=parse_bytes(kv_memory),
        engine_args=json_object("--engine-args", engine_args),
        model=model or str(make_model()),
        **others,
    )


def _once(given: list[_Value] | None, default: list[_Value]) -> tuple[_Value, ...]:
    return tuple(dict.fromkeys(given or default))


def _retrieval_tasks(given: list[str]) -> tuple[str, ...]:
    from pyramid_vllm.tools.quality.retrieval import TASKS

    for name in given:
        if name not in (*TASKS, "all", "none"):
            raise ValueError(
                f"retrieval is '{name}': valid tasks are {', '.join(TASKS)}, all, none"
            )
    if given == ["none"]:
        return ()
    return TASKS if "all" in given else _once(given, [])


def run_eval(settings: "EvalSettings", out: Path, console: Console) -> None:
    """Evaluate, print the tables, write ``results.json`` and the pictures.

    Raises:
        ValueError: an option is not valid.
        RuntimeError: an engine failed, or matplotlib is missing.
        OSError: a file cannot be read or written.
    """
    from transformers import AutoConfig, AutoTokenizer

    from pyramid_vllm.compat import check_vllm_version
    from pyramid_vllm.model_shape import ModelShape
    from pyramid_vllm.policy import profile_weights
    from pyramid_vllm.tools.plotting import check_matplotlib
    from pyramid_vllm.tools.quality.evaluation import Evaluation
    from pyramid_vllm.tools.quality.report import summarize
    from pyramid_vllm.tools.quality.settings import make_sides, make_tasks
    from pyramid_vllm.tools.stop_ids import stop_ids

    check_vllm_version()
    check_matplotlib()  # before hours of work, not after them
    config = AutoConfig.from_pretrained(settings.model)
    num_layers = ModelShape.of(config).num_layers
    weights = profile_weights(config.get_text_config())
    sides = make_sides(settings, num_layers, weights)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tasks = make_tasks(settings, tokenizer, stop_ids(settings.model, tokenizer))
    if settings.text is None:
        console.print("no text is given: only synthetic tasks and problem files run")
    outcomes = Evaluation(settings, sides, tasks, out, console).outcomes()
    summaries = [
        summarize(outcome, outcomes[0], tasks, settings.seed) for outcome in outcomes
    ]
    _print(outcomes, summaries, tasks, console)
    _write(settings, outcomes, summaries, tasks, out)
    _draw(outcomes, summaries, tasks, out)
    console.print(f"results are in {out}")


def _print(
    outcomes: "list[Outcome]",
    summaries: "list[Summary]",
    tasks: "list[Task]",
    console: Console,
) -> None:
    from pyramid_vllm.tools.quality.report import task_table, text_table

    kinds = {task.kind for task in tasks}
    if "continuation" in kinds:
        console.print(text_table(outcomes, summaries))
    if kinds & {"retrieval", "gsm8k"}:
        console.print(task_table(outcomes, summaries, tasks))


def _write(
    settings: "EvalSettings",
    outcomes: "list[Outcome]",
    summaries: "list[Summary]",
    tasks: "list[Task]",
    out: Path,
) -> None:
    from dataclasses import asdict

    from pyramid_vllm.tools.provenance import provenance
    from pyramid_vllm.tools.quality.report import as_json

    content = {
        "settings": asdict(settings),
        "sides": as_json(outcomes, summaries, tasks),
    } | provenance(settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _draw(
    outcomes: "list[Outcome]",
    summaries: "list[Summary]",
    tasks: "list[Task]",
    out: Path,
) -> None:
    from pyramid_vllm.tools.quality.plots import plot_losses, plot_retrieval

    if any(task.kind == "continuation" for task in tasks):
        plot_losses(outcomes, summaries, out / "loss.png")
    found = [task for task in tasks if task.kind == "retrieval"]
    if not found:
        return
    for label in dict.fromkeys(outcome.side.label for outcome in outcomes[1:]):
        shown = [i for i, o in enumerate(outcomes) if i == 0 or o.side.label == label]
        name = label.replace(" ", "-").replace("/", "-")
        plot_retrieval(
            [outcomes[i] for i in shown],
            [summaries[i] for i in shown],
            found,
            out / f"retrieval-{name}.png",
        )
