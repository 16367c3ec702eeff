"""Figures of an evaluation: as JSON and as tables."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from rich.table import Table

from pyramid_vllm.tools.quality.evaluation import Outcome
from pyramid_vllm.tools.quality.statistics import (
    Interval,
    mean_interval,
    ratio_interval,
)
from pyramid_vllm.tools.quality.tasks import Task

Summary = dict[str, Any]
#: Columns of a table by name: task, figure, format.
_Columns = Mapping[str, tuple[str, str, str]]
_TEXT_COLUMNS: _Columns = {
    "loss": ("continuation", "loss", ".3f"),
    "minus full": ("continuation", "loss_difference", "+.3f"),
    "of the loss": ("continuation", "loss_difference_share", "+.1%"),
    "KL": ("continuation", "divergence", ".3f"),
    "same top token": ("continuation", "top_agreement", ".0%"),
    "match length": ("agreement", "match_length", ".0f"),
}


def summarize(
    outcome: Outcome, full: Outcome, tasks: Sequence[Task], seed: int
) -> Summary:
    """Means with intervals of one side; losses against the full cache's, in pairs."""
    summary: Summary = {}
    for task in tasks:
        values = outcome.values[task.name]
        figures: Summary = {
            name: mean_interval(column, seed) for name, column in values.items()
        }
        if task.kind == "continuation":
            theirs = full.values[task.name]["loss"]
            pairs = zip(values["loss"], theirs, strict=True)
            differences = [a - b for a, b in pairs]
            figures["loss_difference"] = mean_interval(differences, seed)
            figures["loss_difference_share"] = ratio_interval(differences, theirs, seed)
        if task.cells:
            cells: dict[float, list[float]] = defaultdict(list)
            for cell, value in zip(task.cells, values["score"], strict=True):
                cells[cell["depth"]].append(value)
            figures["by_depth"] = [
                {"depth": depth, "score": fmean(scores)}
                for depth, scores in cells.items()
            ]
        activity = outcome.results[task.name].activity
        stock = full.results[task.name].activity
        figures["kv_share"] = activity.kv_bytes_per_request / stock.kv_bytes_per_request
        figures["kept_share"] = activity.kept_tokens / activity.prompt_tokens
        summary[task.name] = figures
    return summary


def as_json(
    outcomes: Sequence[Outcome], summaries: Sequence[Summary], tasks: Sequence[Task]
) -> list[dict[str, Any]]:
    """Settings, summary, activity and the values of every sample of each side."""

    def run(outcome: Outcome, summary: Summary, task: Task) -> dict[str, Any]:
        result = outcome.results[task.name]
        return {
            "summary": {
                name: asdict(figure) if isinstance(figure, Interval) else figure
                for name, figure in summary[task.name].items()
            },
            "activity": asdict(result.activity),
            "seconds": result.seconds,
            "samples": outcome.values[task.name],
            "cells": list(task.cells),
        }

    return [
        {
            "label": outcome.side.label,
            "policy": outcome.side.policy,
            "retention": outcome.side.retention,
            "tasks": {task.name: run(outcome, summary, task) for task in tasks},
        }
        for outcome, summary in zip(outcomes, summaries, strict=True)
    ]


def text_table(outcomes: Sequence[Outcome], summaries: Sequence[Summary]) -> Table:
    """Losses, divergence and agreement on the text."""
    columns = {k: spec for k, spec in _TEXT_COLUMNS.items() if spec[0] in summaries[0]}
    table = _table("Continuation of a text", outcomes, summaries, columns)
    table.caption = (
        "Loss and KL in nats a token; beside the full cache's; match length: "
        "greedy tokens until the first that differs; below: 95% bootstrap intervals"
    )
    return table


def task_table(
    outcomes: Sequence[Outcome], summaries: Sequence[Summary], tasks: Sequence[Task]
) -> Table:
    """Scores of retrieval and mathematics."""
    figures = {"retrieval": "score", "gsm8k": "right"}
    columns = {
        task.name.replace("_", " "): (task.name, figures[task.kind], ".0%")
        for task in tasks
        if task.kind in figures
    }
    table = _table("Share of right answers", outcomes, summaries, columns)
    first = next(iter(columns.values()))[0]
    table.caption = f"Memory is of {first}; below: 95% bootstrap intervals"
    return table


def _table(
    title: str,
    outcomes: Sequence[Outcome],
    summaries: Sequence[Summary],
    columns: _Columns,
) -> Table:
    """A row a side; memory is that of the first column's task."""
    table = Table("policy", title=title)
    for name in ("KV bytes", "tokens kept", *columns):
        table.add_column(name, justify="right")
    memory_task = next(iter(columns.values()))[0]
    for outcome, summary in zip(outcomes, summaries, strict=True):
        memory = summary[memory_task]
        cells = [
            _cell(summary[task][name], spec) for task, name, spec in columns.values()
        ]
        table.add_row(
            f"{outcome.side.label} {retention_label(outcome)}".strip(),
            f"{memory['kv_share']:.1%}",
            f"{memory['kept_share']:.1%}",
            *cells,
        )
    return table


def retention_label(outcome: Outcome) -> str:
    """The retention asked for, else the policy's own."""
    config, retention = outcome.side.config, outcome.side.retention
    if config is None:
        return ""
    if retention is None and config.budget != "retention":
        return "its own"
    return f"{config.retention if retention is None else retention:g}"


def _cell(figure: Interval, spec: str) -> str:
    low = f"{figure.low:{spec}}".rstrip("%")
    return f"{figure.value:{spec}}\n{low} to {figure.high:{spec}}"
