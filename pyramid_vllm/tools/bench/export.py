"""Medians of a sweep, for other programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.figures import HIT_RATE
from pyramid_vllm.tools.bench.report import PointReport
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.bench.summary import Summary
from pyramid_vllm.tools.provenance import provenance

#: Of the file -> of the summaries.
_KEYS = {
    "tokens_per_s": "total_tokens_per_s",
    "max_num_running": "max_num_running",
    "num_rows_computed": "num_rows_computed",
    "num_preemptions": "num_preemptions",
    "num_prompt_tokens_computed": "num_prompt_tokens_computed",
    HIT_RATE: HIT_RATE,
    "ttft_p50_s": "ttft_p50_s",
    "tpot_p50_s": "tpot_p50_s",
    "kv_bytes_per_request": "kv_bytes_per_request",
}


def save_medians(
    settings: BenchSettings, reports: Sequence[PointReport], file: Path
) -> None:
    """Write the medians of every point and side."""
    content = {
        "points": [_point(settings, report) for report in reports],
        "settings": settings.describe(),
    } | provenance(settings.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _point(settings: BenchSettings, report: PointReport) -> dict[str, Any]:
    point = report.point
    return {
        "kv_memory": point.kv_memory,
        "kv_bytes": point.kv_bytes,
        "request_rate": point.request_rate,
        "memory_binds": report.memory_binds,
        "shared_prefix": settings.shared_prefix,
        "num_prefixes": settings.num_prefixes,
        "turns": settings.turns,
        "sides": {
            name: _side(name, summary) | {"prefix_caching": report.prefix_caching[name]}
            for name, summary in report.sides.items()
        },
    }


def _side(name: str, summary: Summary) -> dict[str, float | None]:
    """Medians; None where a workload has no such figure."""
    found = {
        ours: summary[theirs]["median"] if theirs in summary else None
        for ours, theirs in _KEYS.items()
    }
    ratio = summary["total_tokens_per_s"]["ratio"]
    return found | {"ratio": 1.0 if name == NONE else ratio["median"]}
