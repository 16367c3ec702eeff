"""The page: one HTML file that needs nothing else."""

from collections import Counter
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
    extra = {key: report[key] for key in ("argv", "date") if key in report}
    return environment.get_template("page.html").render(
        report,
        report=report,
        total_bytes=sum(tier["kv_bytes"] for tier in report["tiers"]),
        notes=_notes(report),
        settings={**report["policy"], **report.get("versions", {}), **extra},
    )


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Notes on each token: its position, its part, how many layers keep it."""
    counts = Counter(p for layer in report["layers"] for p in layer["positions"])
    return [
        f"Position {position} (id {token['id']}, {_part(report, position)}): "
        f"kept in {counts[position]} of {len(report['layers'])} layers"
        for position, token in enumerate(report["tokens"])
    ]


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
