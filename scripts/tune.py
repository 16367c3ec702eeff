"""Search a policy's settings on a model: what costs least at the same memory.

Coordinate search: all values of each setting are tried beside the best policy so far,
on the same prefills, the best change is taken, and so on while it gains. Costs are the
KL of the next-token distribution from the full cache's after a compressed prompt, and
needles that the full cache finds and the policy loses.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pyramid_vllm.policy import (
    KVPolicyError,
    LengthRule,
    PolicyConfig,
    fitted,
    profile_weights,
    resolve_policy,
    tier_layout,
)
from pyramid_vllm.tools.analysis.dense import DenseModel
from pyramid_vllm.tools.analysis.hypotheses import Continuation
from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.figures import right_table
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.quality.retrieval import make_samples
from pyramid_vllm.tools.quality.texts import read_part, windows

SEED = 0
#: Values that are tried of each setting.
SPACE: dict[str, list[Any]] = {
    "steepness": [0.0, 0.15, 0.3, 0.5],
    "recent": [32, 64, 128, 256, 512],
    "recent_ratio": [0.0, 0.05, 0.1, 0.2],
    "queries": [None, 16, 64, 128, 256],
    "distance_weight": [1.0, 1.2, 3.0],
    "pooling": ["none", "avg", "max"],
    "pool_kernel": [3, 5, 7, 11, 15],
    "selection": ["layer", "head"],
    "scorer": ["attention", "votes", "key_norm", "recency"],
    "min_context": [64, 128, 256],
    "sinks": [0, 4, 16, 64],
    "tiers": ["auto", "layers"],
    # Where pruning starts, as shares of the model's layers; None: nowhere.
    "prune_from": [None, 0.0, 0.2, 0.4, 0.6, 0.8],
}
#: Cost of a lost needle, in nats of divergence.
NEEDLE_COST = 0.05


@dataclass(frozen=True)
class Trial:
    """What a policy cost on every text window and needle."""

    loss: list[float]
    divergence: list[float]
    found: list[bool]

    @property
    def cost(self) -> float:
        """Mean divergence, plus the mean cost of lost needles."""
        lost = statistics.mean(not found for found in self.found) if self.found else 0
        return statistics.mean(self.divergence) + NEEDLE_COST * lost


def changes(
    policy: PolicyConfig, num_layers: int, settings: list[str]
) -> Iterator[tuple[str, PolicyConfig]]:
    """Policies that differ from one policy in one setting, by what differs."""
    for name in settings:
        for value in SPACE[name]:
            if name == "prune_from" and value is not None:
                value = int(value * num_layers)
            if getattr(policy, name) == value:
                continue
            try:
                changed = resolve_policy(policy, {name: value})
            except KVPolicyError:
                continue  # some settings exclude others
            assert changed is not None
            yield f"{name}={value}", changed


Prompt = tuple[str, list[int], list[int]]


def prompts(
    tokenizer: Any, texts: list[str], num_tokens: int, num_windows: int, needles: int
) -> list[Prompt]:
    """The prompts on which policies are tried: kind, prompt and the tokens after it."""
    found: list[Prompt] = []
    for text in texts:
        parts = windows(tokenizer.encode(text), num_tokens, 128, num_windows)
        found += [("text", prefix, target) for prefix, target in parts]
    for index in range(needles):
        depth = (index + 0.5) / needles
        (sample,) = make_samples(
            "single_needle", tokenizer, num_tokens, depth, 1, SEED, texts[0]
        )
        answer = tokenizer.encode(f" {sample.answers[0]}", add_special_tokens=False)
        found.append(("needle", sample.prompt_ids, answer))
    return found


def try_out(
    model: DenseModel, policies: dict[str, PolicyConfig], on: list[Prompt]
) -> dict[str, Trial]:
    """Try every policy on every prompt, without needles that the full cache misses."""
    rules = {
        name: LengthRule(policy, tier_layout(policy, model.num_layers))
        for name, policy in policies.items()
    }
    trials = {name: Trial([], [], []) for name in policies}
    for kind, prompt, target in track(on, description=f"{len(rules)} policies"):
        continuation = Continuation(model, prompt, target, list(rules.values()))
        if kind == "needle" and not continuation.is_certain:
            continue
        for name, rule in rules.items():
            cost = continuation.policy_cost(rule)
            if kind == "needle":
                # The full cache's most likely tokens are the answer's.
                trials[name].found.append(cost.agreement == 1)
            else:
                trials[name].loss.append(cost.loss)
                trials[name].divergence.append(cost.divergence)
    return trials


def search(
    model: DenseModel,
    policy: PolicyConfig,
    on: list[Prompt],
    settings: list[str],
    rounds: int,
) -> tuple[PolicyConfig, list[dict[str, Trial]]]:
    """The best policy found, and what was tried in each round."""
    history = []
    for _ in range(rounds):
        candidates = {"as it is": policy}
        candidates |= dict(changes(policy, model.num_layers, settings))
        trials = try_out(model, candidates, on)
        history.append(trials)
        Console().print(table(trials))
        best = min(trials, key=lambda name: trials[name].cost)
        if best == "as it is":
            break
        policy = candidates[best]
    return policy, history


def table(trials: dict[str, Trial]) -> Table:
    """Policies by cost, the best first."""
    made = right_table(("", "KL, nats", "loss, nats", "needles found"), "")
    for name, trial in sorted(trials.items(), key=lambda item: item[1].cost):
        made.add_row(
            name,
            f"{statistics.mean(trial.divergence):.4f}",
            f"{statistics.mean(trial.loss):+.4f}",
            f"{sum(trial.found)}/{len(trial.found)}",
        )
    return made


def main(
    text: Annotated[list[Path], typer.Option(help="Long texts to tune on.")],
    model: Annotated[str | None, typer.Option()] = None,
    kv_policy: Annotated[str, typer.Option(help="Where to start.")] = "pyramid",
    kv_policy_config: Annotated[str | None, typer.Option()] = None,
    text_from: Annotated[float, typer.Option()] = 0.0,
    text_to: Annotated[float, typer.Option(help="Keep the rest held out.")] = 0.5,
    prompt_tokens: Annotated[int, typer.Option(min=256)] = 2048,
    num_windows: Annotated[int, typer.Option("--windows", help="Of each text.")] = 3,
    needles: Annotated[int, typer.Option(min=0)] = 4,
    setting: Annotated[
        list[str] | None, typer.Option(help="Settings to vary; default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print what each change of each setting costs, and the best policy found."""
    from transformers import AutoConfig, AutoTokenizer

    policy = resolve_policy(kv_policy, kv_policy_config)
    if policy is None:
        raise typer.BadParameter("kv_policy 'none' has no settings")
    names = setting or list(SPACE)
    for name in set(names) - SPACE.keys():
        raise typer.BadParameter(f"setting is '{name}': valid are {', '.join(SPACE)}")
    folder = model or str(make_model())
    config = AutoConfig.from_pretrained(folder).get_text_config()
    policy = fitted(policy, profile_weights(config))
    texts = [read_part(path, text_from, text_to) for path in text]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    on = prompts(tokenizer, texts, prompt_tokens, num_windows, needles)
    best, history = search(DenseModel(folder), policy, on, names, rounds)
    Console().print(best.model_dump(exclude_defaults=True))
    if json_file is not None:
        tried = TypeAdapter(list[dict[str, Trial]]).dump_python(history)
        content = {"best": best.model_dump(mode="json"), "rounds": tried}
        write_report(json_file, content, SEED)


if __name__ == "__main__":
    typer.run(main)
