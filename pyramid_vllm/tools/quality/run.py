"""``pyramid-vllm eval``: prints tables, writes ``results.json`` and pictures."""

from dataclasses import asdict

from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from pyramid_vllm.compat import check_vllm_version
from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import profile_weights
from pyramid_vllm.tools.chat import stop_ids
from pyramid_vllm.tools.plotting import check_matplotlib
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.quality.evaluation import Evaluation
from pyramid_vllm.tools.quality.plots import plot_losses, plot_retrieval
from pyramid_vllm.tools.quality.report import as_json, outcomes_of, tables
from pyramid_vllm.tools.quality.settings import EvalSettings, make_sides, make_tasks


def run_eval(settings: EvalSettings) -> None:
    """Evaluate, print the tables, write ``results.json`` and the pictures.

    Raises:
        ValueError: an option is not valid.
        RuntimeError: an engine failed, or matplotlib is missing.
        OSError: a file cannot be read or written.
    """
    console, out = Console(), settings.out
    check_vllm_version()
    check_matplotlib()  # before hours of work, not after them
    config = AutoConfig.from_pretrained(settings.model)
    num_layers = ModelShape.of(config).num_layers
    weights = profile_weights(config.get_text_config())
    sides = make_sides(settings, num_layers, weights)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tasks = make_tasks(settings, tokenizer, stop_ids(str(settings.model), tokenizer))
    if settings.text is None:
        console.print("no text is given: only synthetic tasks run")
    found = Evaluation(settings, sides, tasks, console).results()
    outcomes = outcomes_of(found, tasks, settings.seed)
    for table in tables(outcomes, tasks):
        console.print(table)
    content = {"settings": asdict(settings), "sides": as_json(outcomes, tasks)}
    write_report(out / "results.json", content, settings.seed)
    if tasks[0].kind == "continuation":
        plot_losses(outcomes, out / "loss.png")
    if retrieval := [task for task in tasks if task.kind == "retrieval"]:
        full, *others = outcomes
        for label in dict.fromkeys(outcome.side.label for outcome in others):
            own = [outcome for outcome in others if outcome.side.label == label]
            name = label.replace(" ", "-").replace("/", "-")
            plot_retrieval([full, *own], retrieval, out / f"retrieval-{name}.png")
    console.print(f"results are in {out}")
