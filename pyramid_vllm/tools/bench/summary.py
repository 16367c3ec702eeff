"""From figures of runs to medians, ranges and ratios to stock."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.figures import Figures

#: Figures of a side's runs, by repeat.
Repeats = list[Figures]
Summary = dict[str, dict[str, Any]]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range."""
    return {
        "median": float(np.median(values)),
        "min": float(min(values)),
        "max": float(max(values)),
        "values": list(values),
    }


def ratios(ours: Sequence[float], stock: Sequence[float]) -> dict[str, Any] | None:
    """Spread of the ratios within each repeat; None where stock has zeros."""
    if not all(stock):
        return None
    return spread([a / b for a, b in zip(ours, stock, strict=True)])


def summarize(sides: dict[str, Repeats]) -> dict[str, Summary]:
    """Of every side and figure: its spread, and that of its ratio to stock.

    Args:
        sides: stock vLLM among them; the runs of one repeat belong together.
    """
    stock = sides[NONE]
    summary: dict[str, Summary] = {}
    for name, runs in sides.items():
        summary[name] = {}
        for key in runs[0]:
            ours = [run[key] for run in runs]
            theirs = [run[key] for run in stock if key in run]
            ratio = ratios(ours, theirs) if len(theirs) == len(ours) else None
            summary[name][key] = spread(ours) | {"ratio": ratio}
    return summary


def memory_binds(fits: bool, num_at_once: int, stock: Repeats) -> bool:
    """Whether memory keeps stock vLLM from running all that it could at once.

    Args:
        fits: whether all of it fits at its full length.
        num_at_once: the requests that may run at once.
        stock: its runs.
    """
    ran_all = all(
        run["max_num_running"] >= num_at_once and not run["num_preemptions"]
        for run in stock
    )
    return not (fits or ran_all)
