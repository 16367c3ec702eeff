"""The analysis of ``pyramid-vllm analyze``."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import track

from pyramid_vllm.policy import KVPolicyError, LengthRule, resolve_policy, tier_layout
from pyramid_vllm.tools.analysis.dense import DenseModel
from pyramid_vllm.tools.analysis.found import Found, suggestion
from pyramid_vllm.tools.analysis.hypotheses import Continuation
from pyramid_vllm.tools.analysis.report import write
from pyramid_vllm.tools.analysis.settings import AnalyzeSettings
from pyramid_vllm.tools.quality.retrieval import make_samples
from pyramid_vllm.tools.quality.texts import python_manual, read_part, windows

_SEED = 0
Prompt = tuple[list[int], list[int]]


def run_analysis(settings: AnalyzeSettings) -> None:
    """Measure, print the tables, write figures and the suggested policy.

    Raises:
        KVPolicyError: the policy is not valid.
        ValueError: the text is too short.
    """
    from transformers import AutoConfig, AutoTokenizer

    policy = resolve_policy(settings.kv_policy, settings.kv_policy_config)
    if policy is None:
        raise KVPolicyError("kv_policy 'none' chooses no tokens")
    if settings.retention is not None:
        policy = policy.model_copy(update={"retention": settings.retention})
    suggestion(policy, None)  # fails early
    text, source = _text(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    sizes = settings.prompt_tokens, settings.target_tokens, settings.windows
    parts = windows(tokenizer.encode(text), *sizes, source)
    needles = _needles(settings, tokenizer, text)
    config = AutoConfig.from_pretrained(settings.model).get_text_config()
    found = Found(settings, config, policy)
    found.rule.cache_lengths(settings.prompt_tokens)  # not every policy fits a model
    model, console = DenseModel(str(settings.model)), Console()
    _measure(found, model, parts[::2], needles, console)
    _try_out(found, model, parts[1::2], console)
    write(found, source, _SEED, console)


def _text(settings: AnalyzeSettings) -> tuple[str, str]:
    """The text and its name."""
    if settings.text is None:
        return python_manual(), "Python's manual"
    part = read_part(settings.text, settings.text_from, settings.text_to)
    return part, str(settings.text)


def _needles(settings: AnalyzeSettings, tokenizer: Any, text: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    length = settings.prompt_tokens
    for index in range(settings.needles):
        depth, seed = (index + 0.5) / settings.needles, _SEED + index
        asked = ("single_needle", tokenizer, length, depth, 1, seed, text)
        (sample,) = make_samples(*asked)
        answer = tokenizer.encode(f" {sample.answers[0]}", add_special_tokens=False)
        prompts.append((sample.prompt_ids, answer))
    return prompts


def _measure(
    found: Found,
    model: DenseModel,
    texts: list[Prompt],
    needles: list[Prompt],
    console: Console,
) -> None:
    settings, policy = found.settings, found.policy
    prompts = [(prompt, True) for prompt in texts] + [(p, False) for p in needles]
    tracked = track(prompts, description="each layer alone", console=console)
    for (prompt, target), is_text in tracked:
        window = Continuation(model, prompt, target, [found.rule])
        # A needle that the full cache misses does not show what layers need.
        if is_text or window.is_certain:
            costs = found.text_costs if is_text else found.needle_costs
            costs.append(window.layer_costs(policy, settings.ratios))


def _try_out(
    found: Found, model: DenseModel, parts: list[Prompt], console: Console
) -> None:
    """Hold the suggestion against the policy, on text that it was not made from."""
    rules = [
        LengthRule(config, tier_layout(config, model.num_layers))
        for config in found.compared()
    ]
    for prompt, target in track(parts, description="the suggestion", console=console):
        window = Continuation(model, prompt, target, rules)
        for rule in rules:
            cost = asdict(window.policy_cost(rule)) | {"full_loss": window.loss}
            found.trial.setdefault(rule.config.name, []).append(cost)
