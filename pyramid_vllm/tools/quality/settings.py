"""The options, sides and tasks of ``eval``, checked before a model loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as settings_class

from pyramid_vllm.policy import LengthRule, PolicyConfig, RequestPolicies, fitted
from pyramid_vllm.policy.profiles import Weights
from pyramid_vllm.policy.requests import RETENTION_ARG
from pyramid_vllm.tools import options
from pyramid_vllm.tools.options import option
from pyramid_vllm.tools.quality.puzzles import WITHOUT_DEPTH
from pyramid_vllm.tools.quality.retrieval import TASKS, make_samples
from pyramid_vllm.tools.quality.tasks import (
    Task,
    agreement_task,
    continuation_task,
    retrieval_task,
)
from pyramid_vllm.tools.quality.texts import read_part, windows
from pyramid_vllm.tools.sides import parse_sides, should_evict


def _tasks(given: tuple[str, ...]) -> tuple[str, ...]:
    """Names of retrieval tasks; 'all' means every task, 'none' no task."""
    for name in given:
        if name not in (*TASKS, "all", "none"):
            raise ValueError(
                f"retrieval is '{name}': valid tasks are {', '.join(TASKS)}, all, none"
            )
    if given == ("none",):
        return ()
    return TASKS if "all" in given else options.once(given)


@settings_class(frozen=True, config=options.SETTINGS_CONFIG)
class EvalSettings:
    """Compare policies with the full cache: losses, retrieval, memory."""

    model: str | None = option(None, options.MODEL_NAME)
    kv_policies: options.Texts = option(("pyramid",), options.POLICY, "--kv-policy")
    retentions: options.Floats = option(
        (), "Asked of each policy in turn; default: its own.", "--retention"
    )
    text: str | None = option(None, "A text file: losses, agreement, haystack.")
    text_from: float = option(0.0, options.TEXT_FROM)
    text_to: float = option(1.0, options.TEXT_TO)
    prompt_tokens: int = option(1024, "Of each window of the text.", min=8)
    target_tokens: int = option(128, "Tokens after each prompt.", min=1)
    windows: int = option(8, "Windows of the text.", min=1)
    agreement_tokens: int = option(
        64, "Greedy tokens after each prompt; 0: none.", min=0
    )
    retrieval: Annotated[tuple[str, ...], AfterValidator(_tasks)] = option(
        ("all",), "A retrieval task, 'all' or 'none'."
    )
    retrieval_tokens: options.Integers = option((1024,), "Lengths of prompts.")
    depths: int = option(5, "Places of a needle, evenly spread.", min=1)
    samples: int = option(4, "Number for each task, length and depth.", min=1)
    seed: int = option(0, "Of samples, engines and intervals.")
    kv_bytes: options.Bytes = option(
        "2GiB", "Bytes, or with KiB, MiB, GiB.", "--kv-memory"
    )
    max_num_batched_tokens: int = option(
        0, "Of vLLM; 0: each prompt is one chunk.", min=0
    )
    dtype: str = option("auto", "The model's.")
    engine_args: options.EngineArgs = option(None, options.ENGINE_ARGS)
    out: Path = option(Path("eval-results"), "Results; runs that are there are kept.")


@dataclass(frozen=True)
class Side:
    """One policy at one retention, or the full cache."""

    label: str
    config: PolicyConfig | None = None
    retention: float | None = None
    """None: the policy's own."""
    rule: LengthRule | None = None

    @property
    def policy(self) -> dict[str, Any] | None:
        """The engine's policy, as JSON can hold it."""
        return None if self.config is None else self.config.model_dump(mode="json")

    @property
    def asked(self) -> str:
        """The retention asked for, else the policy's own; of the full cache, none."""
        if self.config is None:
            return ""
        if self.retention is None and self.config.budget != "retention":
            return "its own"
        own = self.config.retention
        return f"{own if self.retention is None else self.retention:g}"

    def should_evict(self, task: Task) -> bool:
        """Whether any of the prompts is longer than what is kept of it."""
        lengths = (len(request.prompt_ids) for request in task.requests)
        return should_evict(self.rule, lengths)


def make_sides(
    settings: EvalSettings, num_layers: int, weights: Weights | None = None
) -> list[list[Side]]:
    """Sides by engine: the full cache, then each policy with its retentions.

    Args:
        settings: the options.
        num_layers: the model's full-attention layers.
        weights: its measured layer weights, if it has a profile.

    Raises:
        KVPolicyError: a policy or a retention of it is not valid.
    """
    engines = [[Side("full cache")]]
    for named in parse_sides(settings.kv_policies):
        if named.policy is None:
            continue  # the full cache, which always runs
        config = fitted(named.policy, weights)
        policies = RequestPolicies(config, num_layers, weights)
        engines.append([])
        for retention in settings.retentions or (None,):
            asked = None if retention is None else {RETENTION_ARG: retention}
            rule = policies.rule_for(asked)
            engines[-1].append(Side(named.name, config, retention, rule))
    return engines


def make_tasks(
    settings: EvalSettings, tokenizer: Any, stop_ids: list[int]
) -> list[Task]:
    """All tasks of an evaluation.

    Raises:
        ValueError: an option is not valid, a file is too short, or nothing is asked.
        OSError: a file cannot be read.
    """
    text = None
    tasks: list[Task] = []
    if settings.text is not None:
        path = Path(settings.text)
        text = read_part(path, settings.text_from, settings.text_to)
        tasks += _text_tasks(settings, tokenizer, text, path.name)
    for name in settings.retrieval:
        for length in settings.retrieval_tokens:
            asked = settings.samples, settings.seed, text
            samples = [
                sample
                for depth in _depths(name, settings.depths)
                for sample in make_samples(name, tokenizer, length, depth, *asked)
            ]
            tasks.append(retrieval_task(samples, tokenizer, stop_ids))
    if not tasks:
        raise ValueError(
            "nothing is asked: valid is a text or a retrieval task; retrieval tasks "
            f"are {', '.join(TASKS)}"
        )
    return tasks


def _text_tasks(
    settings: EvalSettings, tokenizer: Any, text: str, source: str
) -> list[Task]:
    start = tokenizer.encode("")  # some models' prompts begin with a special token
    ids = tokenizer.encode(text, add_special_tokens=False)
    num_prefix = settings.prompt_tokens - len(start)
    parts = windows(ids, num_prefix, settings.target_tokens, settings.windows, source)
    found = [(start + prefix, target) for prefix, target in parts]
    tasks = [continuation_task(found)]
    if settings.agreement_tokens:
        tasks.append(agreement_task(found, settings.agreement_tokens))
    return tasks


def _depths(task: str, num_depths: int) -> list[float]:
    """Depths from the oldest to the newest, evenly spread."""
    if num_depths == 1 or task in WITHOUT_DEPTH:
        return [0.5]
    return [round(i / (num_depths - 1), 4) for i in range(num_depths)]
