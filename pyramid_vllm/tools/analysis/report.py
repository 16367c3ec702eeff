"""Tables and files of an analysis."""

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from pyramid_vllm.policy.profiles import IDENTITY
from pyramid_vllm.tools.analysis.found import Found
from pyramid_vllm.tools.figures import right_table
from pyramid_vllm.tools.provenance import write_report


def write(found: Found, source: str, seed: int, console: Console) -> None:
    """Print tables; write ``results.json``, ``policy.yaml`` and ``profile.yaml``.

    Args:
        found: what to write.
        source: the text's name.
        seed: of the needles.
        console: where to print.
    """
    settings, out = found.settings, found.settings.out
    out.mkdir(parents=True, exist_ok=True)
    console.print(_layer_table(found))
    console.print(_trial_table(found.trial))
    console.print(
        f"{len(found.needle_costs)} of {settings.needles} needles were found with the "
        "full cache, and count"
    )
    content = {
        "settings": {**asdict(settings), "text": source},
        "text_costs": np.array(found.text_costs).tolist(),
        "needle_costs": np.array(found.needle_costs).tolist(),
        "suggested_shares": found.shares,
        "trial": found.trial,
    }
    write_report(out / "results.json", content, seed)
    identity = {name: getattr(found.model, name, None) for name in IDENTITY}
    # The whole policy: a file's missing settings come from the preset ``pyramid``.
    _write_yaml(out / "policy.yaml", found.suggested.model_dump(mode="json"))
    profile = {"model": identity, "layer_weights": found.shares}
    _write_yaml(out / "profile.yaml", profile)
    console.print(f"In {out}: policy.yaml, profile.yaml, results.json")


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False)
    path.write_text(f"# Made by pyramid-vllm analyze.\n{text}", encoding="utf-8")


def _layer_table(found: Found) -> Table:
    """A row a layer: what cutting it costs, the suggested share."""
    settings = found.settings
    table = right_table(
        ("layer", *(f"{r:.0%} kept" for r in settings.ratios), "suggested share"),
        "KL to the full cache, in nats a token, with one layer cut to a share; the "
        "suggestion",
    )
    costs = found.costs[..., 1]
    for layer, share in enumerate(found.shares):
        table.add_row(
            str(layer),
            *(f"{cost:.4f}" for cost in costs[:, layer]),
            f"{share:.0%}",
        )
    return table


def _trial_table(trial: dict[str, list[dict[str, float]]]) -> Table:
    """A row a policy: what it costs on text that the suggestion was not made from."""
    table = right_table(
        ("", "loss, nats", "rise of it", "KL", "top-1 agreement"),
        "Policies at the same mean retention, on other windows",
    )
    for name, costs in trial.items():
        mean = {key: fmean(cost[key] for cost in costs) for key in costs[0]}
        table.add_row(
            name,
            f"{mean['full_loss'] + mean['loss']:.3f}",
            f"{mean['loss']:+.4f} ({mean['loss'] / mean['full_loss']:+.2%})",
            f"{mean['divergence']:.4f}",
            f"{mean['agreement']:.1%}",
        )
    return table
