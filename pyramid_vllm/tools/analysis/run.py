"""The analysis behind ``pyramid-vllm analyze``."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import track

from pyramid_vllm.policy import (
    KVPolicyError,
    LengthRule,
    resolve_policy,
    tier_layout,
)
from pyramid_vllm.policy.profiles import IDENTITY
from pyramid_vllm.tools.analysis.dense import DenseModel
from pyramid_vllm.tools.analysis.found import Found, retention_of, suggestion
from pyramid_vllm.tools.analysis.hypotheses import Continuation, crucial_overlap
from pyramid_vllm.tools.analysis.plots import plot_costs, plot_overlaps
from pyramid_vllm.tools.analysis.settings import WINDOW, AnalyzeSettings
from pyramid_vllm.tools.analysis.tables import layer_table, trial_table
from pyramid_vllm.tools.plotting import check_matplotlib
from pyramid_vllm.tools.provenance import provenance
from pyramid_vllm.tools.quality.retrieval import make_samples
from pyramid_vllm.tools.quality.texts import read_part, windows

#: Share of the tokens that a window chooses, when windows are compared.
_SHARE = 0.2
_SEED = 0
Prompt = tuple[Sequence[int], Sequence[int]]


def run_analysis(settings: AnalyzeSettings) -> None:
    """Measure, print the tables, write plots, figures and the suggested policy.

    Raises:
        KVPolicyError: the policy is not valid.
        ValueError: the text is too short.
        RuntimeError: matplotlib is missing.
    """
    from transformers import AutoConfig, AutoTokenizer

    check_matplotlib()
    policy = resolve_policy(settings.kv_policy, settings.kv_policy_config)
    if policy is None:
        raise KVPolicyError("kv_policy 'none' chooses no tokens")
    suggestion(policy, retention_of(settings, policy), None)  # fails early
    text, source = _text(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    parts: list[Prompt] = [
        (part.prefix, part.target)
        for part in windows(
            tokenizer.encode(text),
            settings.prompt_tokens,
            settings.target_tokens,
            settings.windows,
            source,
        )
    ]
    needles = _needles(settings, tokenizer, text)
    config = AutoConfig.from_pretrained(settings.model).get_text_config()
    found = Found(settings, config, policy)
    found.rule.cache_lengths(settings.prompt_tokens)  # not every policy fits a model
    model, console = DenseModel(settings.model), Console()
    _measure(found, model, parts[::2], needles, console)
    _try_out(found, model, parts[1::2], console)
    _write(found, source, console)


def _text(settings: AnalyzeSettings) -> tuple[str, str]:
    """The text and its name."""
    if settings.text is None:
        return "\n\n".join(topics[name] for name in sorted(topics)), "Python's manual"
    part = read_part(settings.text, settings.text_from, settings.text_to)
    return part, str(settings.text)


def _needles(settings: AnalyzeSettings, tokenizer: Any, text: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    for index in range(settings.needles):
        (sample,) = make_samples(
            "single_needle",
            tokenizer,
            settings.prompt_tokens,
            (index + 0.5) / settings.needles,
            1,
            _SEED + index,
            text,
        )
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
    num_queries = max(settings.distances) + WINDOW
    for index, (prompt, target) in enumerate(
        track([*texts, *needles], description="each layer alone", console=console)
    ):
        window = Continuation(model, prompt, target, [found.rule], num_queries)
        if index >= len(texts):
            # What the full cache does not find says nothing of what layers need.
            if window.is_certain:
                costs = window.layer_costs(policy, settings.ratios)
                found.needle_costs.append(costs)
            continue
        found.text_costs.append(window.layer_costs(policy, settings.ratios))
        found.overlaps.append(
            crucial_overlap(window.full, policy, settings.distances, WINDOW, _SHARE)
        )


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


def _write(found: Found, source: str, console: Console) -> None:
    """Tables, ``results.json``, ``icr.png``, ``rac.png``, ``policy.yaml`` and
    ``profile.yaml``."""
    settings, out = found.settings, found.settings.out
    out.mkdir(parents=True, exist_ok=True)
    console.print(layer_table(found))
    console.print(trial_table(found.trial))
    console.print(
        f"{len(found.needle_costs)} of {settings.needles} needles were found with the "
        "full cache, and count"
    )
    plot_costs(found, out / "icr.png")
    plot_overlaps(found, out / "rac.png")
    content = {
        "settings": {**asdict(settings), "text": source, "out": str(out)},
        "text_costs": np.array(found.text_costs).tolist(),
        "needle_costs": np.array(found.needle_costs).tolist(),
        "overlaps": np.array(found.overlaps).tolist(),
        "suggested_shares": found.shares,
        "trial": found.trial,
    } | provenance(_SEED)
    text = json.dumps(content, indent=2)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    identity = {name: getattr(found.model, name, None) for name in IDENTITY}
    _write_yaml(
        out / "policy.yaml",
        # All of it: what a file leaves out comes from the preset ``pyramid``.
        found.suggested.model_dump(mode="json"),
    )
    _write_yaml(
        out / "profile.yaml", {"model": identity, "layer_weights": found.shares}
    )
    console.print(
        f"In {out}: policy.yaml, profile.yaml, results.json, icr.png, rac.png"
    )


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False)
    path.write_text(f"# Made by pyramid-vllm analyze.\n{text}", encoding="utf-8")
