"""The page: one HTML file that needs nothing else."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader

from pyramid_vllm.policy.tiers import runs
from pyramid_vllm.tools.sizes import format_bytes


def page(report: Mapping[str, Any]) -> str:
    """The page of a report, which is the JSON."""
    loader = PackageLoader("pyramid_vllm.tools.inspection", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters |= {
        "bytes": format_bytes,
        "runs": runs,
        "number": "{:,}".format,
        "percent": "{:.1%}".format,
    }
    tiers = report["tiers"]
    means = {
        name: sum(tier[name] * len(tier["layers"]) for tier in tiers)
        / len(report["layers"])
        for name in ("num_prompt_held", "num_held", "pages")
    }
    extra = {key: report[key] for key in ("argv", "date") if key in report}
    return environment.get_template("page.html").render(
        report,
        report=report,
        means=means,
        total_bytes=sum(tier["kv_bytes"] for tier in tiers),
        notes=_notes(report),
        settings={**report["policy"], **report.get("versions", {}), **extra},
    )


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Notes on each token: its position, the layers that keep it, by how many heads."""
    layers_by_count: list[defaultdict[int, list[int]]] = [
        defaultdict(list) for _ in report["tokens"]
    ]
    for layer in report["layers"]:
        for position, heads in zip(layer["positions"], layer["heads"], strict=True):
            layers_by_count[position][heads].append(layer["layer"])
    notes = []
    for position, found in enumerate(layers_by_count):
        where = f"id {report['tokens'][position]['id']}, {_part(report, position)}"
        num_kept = sum(map(len, found.values()))
        note = f"Position {position} ({where}): kept in {num_kept} of "
        note += f"{len(report['layers'])} layers"
        who = [
            f"{heads} of {report['num_kv_heads']} heads in layers {runs(tuple(layers))}"
            for heads, layers in sorted(found.items(), reverse=True)
        ]
        notes.append(f"{note}: {'; '.join(who)}" if who else note)
    return notes


def _part(report: Mapping[str, Any], position: int) -> str:
    """The part of the sequence in which a token is."""
    num_prompt = report["num_prompt"]
    if position >= report["num_computed"]:
        return "generated last, not in the cache yet"
    if position >= num_prompt:
        return "generated"
    if position < report["sinks"]:
        return "sink, always kept"
    if position >= num_prompt - report["recent"]:
        return "recent window, always kept"
    return "prompt"
