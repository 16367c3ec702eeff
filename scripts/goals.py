"""From the steps' results to goals, JSON and Markdown."""

import json
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyramid_vllm.tools.quality.activity import Activity
from pyramid_vllm.tools.quality.jobs import JobResult
from pyramid_vllm.tools.quality.settings import EvalSettings, make_tasks
from pyramid_vllm.tools.quality.statistics import mean_interval, ratio_interval
from pyramid_vllm.tools.quality.tasks import Task

NOTHING = Activity(0, 0, 0, 0.0, 0.0, 0.0)
DEFAULT = "pyramid"
RETENTION = 0.4
Goal = dict[str, Any]
Results = dict[str, Any]


def goal(
    name: str,
    aim: str,
    value: float,
    interval: Sequence[float] | None,
    met: bool,
    command: str,
) -> Goal:
    """One goal, as JSON holds it."""
    return {
        "name": name,
        "goal": aim,
        "value": value,
        "interval": None if interval is None else list(interval),
        "met": bool(met),
        "command": command,
    }


def side(results: Results, label: str = DEFAULT) -> Results:
    """A policy's tasks, at the default's retention."""
    for found in results["sides"]:
        if found["label"] == label and found["retention"] in (RETENTION, None):
            tasks: Results = found["tasks"]
            return tasks
    raise ValueError(f"the results have no side '{label}' at {RETENTION}")


def needles(tasks: Results) -> list[float]:
    """Scores of single needles."""
    for name, task in tasks.items():
        if name.startswith("single_needle"):
            values: list[float] = task["samples"]["score"]
            return values
    raise ValueError("the results have no needles")


def quality_goals(results: Results, model: str, command: str) -> list[Goal]:
    """Loss and retrieval of one model."""
    ours, full = side(results), side(results, "full cache")
    share = ours["continuation"]["summary"]["loss_difference_share"]
    goals = [
        goal(
            f"continuation loss above the full cache's, {model}",
            "at most 1%",
            share["value"],
            (share["low"], share["high"]),
            share["value"] <= 0.01,
            command,
        )
    ]
    theirs = needles(full)
    if statistics.mean(theirs) >= 0.9:
        ratio = ratio_interval(needles(ours), theirs, 0)
        goals.append(
            goal(
                f"needles found, of the full cache's, {model}",
                "at least 0.95",
                ratio.value,
                (ratio.low, ratio.high),
                ratio.value >= 0.95,
                command,
            )
        )
    return goals


def peer_figures(peers: Results, retrieval: Task) -> Results:
    """Of each press: what its loss rises by, and its needles."""
    found: Results = {}
    full = [statistics.mean(window) for window in peers["full"]["nll"]]
    for name, press in peers["presses"].items():
        losses = [statistics.mean(window) for window in press["nll"]]
        rises = [a - b for a, b in zip(losses, full, strict=True)]
        outputs = JobResult(press["outputs"], [], [], NOTHING, 0.0)
        found[name] = {
            "rises": rises,
            "share": asdict(ratio_interval(rises, full, 0)),
            "scores": retrieval.grade(outputs, outputs)["score"],
            "kept_tokens": press["kept_tokens"],
        }
    return found


def peer_goals(results: Results, figures: Results, command: str) -> list[Goal]:
    """Ours against the best press, in loss and in retrieval."""
    ours = side(results)
    theirs = side(results, "full cache")["continuation"]["samples"]["loss"]
    losses = ours["continuation"]["samples"]["loss"]
    rises = [a - b for a, b in zip(losses, theirs, strict=True)]
    best = min(figures.values(), key=lambda f: statistics.mean(f["rises"]))
    pairs = zip(rises, best["rises"], strict=True)
    difference = mean_interval([a - b for a, b in pairs], 0)
    most = max(statistics.mean(f["scores"]) for f in figures.values())
    found = statistics.mean(needles(ours))
    return [
        goal(
            "rise of the loss less that of kvpress's best, nats a token",
            "below 0",
            difference.value,
            (difference.low, difference.high),
            difference.value < 0,
            command,
        ),
        goal(
            "needles found less those of kvpress's best",
            "above 0",
            found - most,
            None,
            found > most,
            command,
        ),
    ]


def _ratio_goal(name: str, aim: str, ratio: Results, met: bool, command: str) -> Goal:
    return goal(name, aim, ratio["median"], (ratio["min"], ratio["max"]), met, command)


def one_prompt_goals(results: Results, command: str) -> list[Goal]:
    """Memory of a request and time to first token."""
    figures = results["points"][0]["sides"][DEFAULT]
    memory = figures["kv_bytes_per_request"]["ratio"]
    sooner = figures["ttft_p50_s"]["ratio"]
    return [
        _ratio_goal(
            "KV bytes a request, 2,048-token prompts, 128 output tokens, of stock's",
            "at most 46%",
            memory,
            memory["median"] <= 0.46,
            command,
        ),
        _ratio_goal(
            "TTFT p50, 2,048-token prompts, of stock's",
            "at most 0.75",
            sooner,
            sooner["median"] <= 0.75,
            command,
        ),
    ]


def batch_goals(results: Results, command: str) -> list[Goal]:
    """Throughput on both sides of the crossover."""
    bound = [
        point["sides"][DEFAULT]["total_tokens_per_s"]["ratio"] | {"at": point["label"]}
        for point in results["points"]
        if point["memory_binds"]
    ]
    free = [
        point["sides"][DEFAULT]["total_tokens_per_s"]["ratio"] | {"at": point["label"]}
        for point in results["points"]
        if not point["memory_binds"]
    ]
    best = max(bound, key=lambda ratio: ratio["median"])
    worst = min(free, key=lambda ratio: ratio["median"])
    return [
        _ratio_goal(
            f"total tokens/s of stock's, KV-bound batch (memory {best['at']})",
            "at least 2.2",
            best,
            best["median"] >= 2.2,
            command,
        ),
        _ratio_goal(
            f"total tokens/s of stock's, unbound batch (memory {worst['at']})",
            "at least 0.97",
            worst,
            worst["median"] >= 0.97,
            command,
        ),
    ]


def load(step: Any) -> Results:
    """A step's results."""
    found: Results = json.loads(step.result.read_text(encoding="utf-8"))
    return found


def collect(done: dict[str, Any]) -> dict[str, Any]:
    """Goals and tables of the steps that are done."""
    goals: list[Goal] = []
    extra: dict[str, Any] = {}
    commands = {name: shlex.join(step.command) for name, step in done.items()}
    for name, model in (("quality", "SmolLM2-135M"), ("quality-second", "second")):
        if name in done:
            results = load(done[name])
            label = (
                model if name == "quality" else Path(results["settings"]["model"]).name
            )
            goals += quality_goals(results, label, commands[name])
    if "peers" in done:
        results = load(done["quality"])
        figures = _peers(done, results)
        goals += peer_goals(results, figures, commands["peers"])
        extra["peers"] = figures
    if "one-prompt" in done:
        goals += one_prompt_goals(load(done["one-prompt"]), commands["one-prompt"])
    if "batch" in done:
        goals += batch_goals(load(done["batch"]), commands["batch"])
    return {"goals": goals, "commands": commands} | extra


def _peers(done: dict[str, Any], results: Results) -> Results:
    from transformers import AutoTokenizer

    settings = eval_settings(results)
    tasks = make_tasks(settings, AutoTokenizer.from_pretrained(settings.model), [])
    (retrieval,) = [task for task in tasks if task.kind == "retrieval"]
    return peer_figures(load(done["peers"]), retrieval)


def eval_settings(results: Results) -> EvalSettings:
    """The settings of an evaluation; JSON has no tuples."""
    return EvalSettings(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in results["settings"].items()
        }
    )
