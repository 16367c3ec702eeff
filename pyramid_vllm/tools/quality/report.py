"""Figures of an evaluation: as JSON and as tables."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from pyramid_vllm.tools.figures import right_table
from pyramid_vllm.tools.quality.evaluation import Results
from pyramid_vllm.tools.quality.jobs import JobResult
from pyramid_vllm.tools.quality.settings import Side
from pyramid_vllm.tools.quality.statistics import mean_interval, ratio_interval
from pyramid_vllm.tools.quality.tasks import Task, Values

#: Columns of a table by name: task, figure, format.
_Columns = Mapping[str, tuple[str, str, str]]
_TEXT_COLUMNS: _Columns = {
    "loss, nats": ("continuation", "loss", ".3f"),
    "minus full cache's": ("continuation", "loss_difference", "+.3f"),
    "of the loss": ("continuation", "loss_difference_share", "+.1%"),
    "KL, nats": ("continuation", "divergence", ".3f"),
    "same top token": ("continuation", "top_agreement", ".0%"),
    "match length": ("agreement", "match_length", ".0f"),
}


@dataclass(frozen=True)
class Outcome:
    """What one side came to, by the tasks' names."""

    side: Side
    results: Results
    values: dict[str, Values]
    summary: dict[str, dict[str, Any]]
    """Means with intervals; losses against the full cache's, in pairs."""


def outcomes_of(
    found: Sequence[tuple[Side, Results]], tasks: Sequence[Task], seed: int
) -> list[Outcome]:
    """Grade all sides, of which the full cache comes first."""
    full = found[0][1]
    graded: list[Outcome] = []
    for side, results in found:
        values = {t.name: t.grade(results[t.name], full[t.name]) for t in tasks}
        first = graded[0].values if graded else values
        summary = {
            name: _figures(task, values[name], first[name], seed)
            | _memory(results[name], full[name])
            for task in tasks
            for name in [task.name]
        }
        graded.append(Outcome(side, results, values, summary))
    return graded


def _figures(task: Task, values: Values, full: Values, seed: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        name: mean_interval(column, seed) for name, column in values.items()
    }
    if task.kind == "continuation":
        pairs = zip(values["loss"], full["loss"], strict=True)
        rises = [ours - theirs for ours, theirs in pairs]
        figures["loss_difference"] = mean_interval(rises, seed)
        figures["loss_difference_share"] = ratio_interval(rises, full["loss"], seed)
    if task.cells:
        scores: dict[float, list[float]] = defaultdict(list)
        for cell, value in zip(task.cells, values["score"], strict=True):
            scores[cell["depth"]].append(value)
        figures["by_depth"] = [
            {"depth": depth, "score": fmean(found)} for depth, found in scores.items()
        ]
    return figures


def _memory(result: JobResult, full: JobResult) -> dict[str, float]:
    ours, theirs = result.activity, full.activity
    return {
        "kv_share": ours.kv_bytes_per_request / theirs.kv_bytes_per_request,
        "kept_share": ours.kept_tokens / ours.prompt_tokens,
    }


def as_json(outcomes: Sequence[Outcome], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Settings, summary, activity and the values of every sample of each side."""
    return [
        {
            "label": outcome.side.label,
            "policy": outcome.side.policy,
            "retention": outcome.side.retention,
            "tasks": {
                task.name: {
                    "summary": outcome.summary[task.name],
                    "activity": asdict(outcome.results[task.name].activity),
                    "seconds": outcome.results[task.name].seconds,
                    "samples": outcome.values[task.name],
                    "cells": list(task.cells),
                }
                for task in tasks
            },
        }
        for outcome in outcomes
    ]


def tables(outcomes: Sequence[Outcome], tasks: Sequence[Task]) -> list[Table]:
    """Losses and agreement on the text; scores of retrieval."""
    names = {task.name for task in tasks}
    text = {k: spec for k, spec in _TEXT_COLUMNS.items() if spec[0] in names}
    scores = {
        task.name.replace("_", " "): (task.name, "score", ".0%")
        for task in tasks
        if task.cells
    }
    titled = {"Continuation of a text": text, "Share of right answers": scores}
    return [_table(k, outcomes, columns) for k, columns in titled.items() if columns]


def _table(title: str, outcomes: Sequence[Outcome], columns: _Columns) -> Table:
    """A row a side; memory is that of the first column's task."""
    first = next(iter(columns.values()))[0]
    caption = f"Memory is of {first}; below: 95% bootstrap intervals"
    names = ("policy", "KV bytes", "tokens kept", *columns)
    table = right_table(names, title, caption=caption)
    for outcome in outcomes:
        summary = outcome.summary
        table.add_row(
            f"{outcome.side.label} {outcome.side.asked}".strip(),
            f"{summary[first]['kv_share']:.1%}",
            f"{summary[first]['kept_share']:.1%}",
            *(
                _cell(summary[task][name], spec)
                for task, name, spec in columns.values()
            ),
        )
    return table


def _cell(figure: dict[str, float], spec: str) -> str:
    low = f"{figure['low']:{spec}}".rstrip("%")
    return f"{figure['value']:{spec}}\n{low} to {figure['high']:{spec}}"
