"""From the steps' results to goals and tables."""

import statistics
from collections.abc import Callable
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
#: A goal: the comparison, the limit, and the limit as people read it.
Aim = tuple[str, float, str]
_MEETS: dict[str, Callable[[float, float], bool]] = {
    "at most": lambda value, limit: value <= limit,
    "at least": lambda value, limit: value >= limit,
    "below": lambda value, limit: value < limit,
    "above": lambda value, limit: value > limit,
}


def goal(
    name: str,
    aim: Aim,
    value: float,
    interval: tuple[float, float] | None,
    command: str,
) -> Goal:
    """One goal, as JSON holds it."""
    how, limit, text = aim
    return {
        "name": name,
        "goal": f"{how} {text}",
        "value": value,
        "interval": None if interval is None else list(interval),
        "met": bool(_MEETS[how](value, limit)),
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
    ours, theirs = side(results), needles(side(results, "full cache"))
    share = ours["continuation"]["summary"]["loss_difference_share"]
    name = f"continuation loss above the full cache's, {model}"
    interval = share["low"], share["high"]
    goals = [goal(name, ("at most", 0.01, "1%"), share["value"], interval, command)]
    if statistics.mean(theirs) >= 0.9:
        ratio = ratio_interval(needles(ours), theirs, 0)
        name = f"needles found, of the full cache's, {model}"
        aim, interval = ("at least", 0.95, "0.95"), (ratio["low"], ratio["high"])
        goals.append(goal(name, aim, ratio["value"], interval, command))
    return goals


def peer_figures(peers: Results, retrieval: Task) -> Results:
    """The rise of the loss and the needles of each press."""
    found: Results = {}
    full = [statistics.mean(window) for window in peers["full"]["nll"]]
    for name, press in peers["presses"].items():
        losses = [statistics.mean(window) for window in press["nll"]]
        rises = [a - b for a, b in zip(losses, full, strict=True)]
        outputs = JobResult(press["outputs"], [], [], NOTHING, 0.0)
        found[name] = {
            "rises": rises,
            "share": ratio_interval(rises, full, 0),
            "scores": retrieval.grade(outputs, outputs)["score"],
            "kept_tokens": press["kept_tokens"],
        }
    return found


def peer_goals(results: Results, figures: Results, command: str) -> list[Goal]:
    """Our loss and retrieval, compared with the best press."""
    ours, full = side(results), side(results, "full cache")
    losses, theirs = (s["continuation"]["samples"]["loss"] for s in (ours, full))
    best = min(figures.values(), key=lambda f: statistics.mean(f["rises"]))["rises"]
    triples = zip(losses, theirs, best, strict=True)
    less = mean_interval([a - b - c for a, b, c in triples], 0)
    found = statistics.mean(needles(ours))
    found -= max(statistics.mean(f["scores"]) for f in figures.values())
    name = "rise of the loss less that of kvpress's best, nats a token"
    interval = less["low"], less["high"]
    loss = goal(name, ("below", 0, "0"), less["value"], interval, command)
    name = "needles found less those of kvpress's best"
    return [loss, goal(name, ("above", 0, "0"), found, None, command)]


def _ratio_goal(name: str, aim: Aim, ratio: Results, command: str) -> Goal:
    return goal(name, aim, ratio["median"], (ratio["min"], ratio["max"]), command)


def one_prompt_goals(results: Results, command: str) -> list[Goal]:
    """Memory of a request and time to first token."""
    figures = results["points"][0]["sides"][DEFAULT]
    memory = "KV bytes a request, 2,048-token prompts, 128 output tokens, of stock's"
    sooner = "TTFT p50, 2,048-token prompts, of stock's"
    num_bytes, ttft = figures["kv_bytes_per_request"], figures["ttft_p50_s"]
    return [
        _ratio_goal(memory, ("at most", 0.46, "46%"), num_bytes["ratio"], command),
        _ratio_goal(sooner, ("at most", 0.75, "0.75"), ttft["ratio"], command),
    ]


def batch_goals(results: Results, command: str) -> list[Goal]:
    """Throughput on both sides of the crossover."""
    ratios: dict[bool, list[Results]] = {True: [], False: []}
    for point in results["points"]:
        ratio = point["sides"][DEFAULT]["total_tokens_per_s"]["ratio"]
        ratios[point["memory_binds"]].append(ratio | {"at": point["label"]})
    best = max(ratios[True], key=lambda ratio: ratio["median"])
    worst = min(ratios[False], key=lambda ratio: ratio["median"])
    bound = f"total tokens/s of stock's, KV-bound batch (memory {best['at']})"
    free = f"total tokens/s of stock's, unbound batch (memory {worst['at']})"
    return [
        _ratio_goal(bound, ("at least", 2.2, "2.2"), best, command),
        _ratio_goal(free, ("at least", 0.97, "0.97"), worst, command),
    ]


def ceiling_of(points: list[Results]) -> float | None:
    """The gain of unlimited memory; None: the points do not have both kinds of
    memory."""
    speeds: dict[bool, float] = {}
    for point in points:
        speed = point["sides"]["none"]["total_tokens_per_s"]["median"]
        binds = point["memory_binds"]
        speeds[binds] = max(speed, speeds.get(binds, 0.0))
    return speeds[False] / speeds[True] if len(speeds) == 2 else None


def collect(results: dict[str, Results], commands: dict[str, str]) -> Results:
    """Goals and tables of the steps that are done, from their results by name."""
    goals: list[Goal] = []
    extra: Results = {}
    for name, model in (("quality", "SmolLM2-135M"), ("quality-second", None)):
        if found := results.get(name):
            model = model or Path(found["settings"]["model"]).name
            goals += quality_goals(found, model, commands[name])
    if found := results.get("peers"):
        tasks, _ = tasks_of(results["quality"])
        extra["peers"] = peer_figures(found, tasks["retrieval"])
        goals += peer_goals(results["quality"], extra["peers"], commands["peers"])
    for name, goals_of in (("one-prompt", one_prompt_goals), ("batch", batch_goals)):
        if found := results.get(name):
            goals += goals_of(found, commands[name])
    return {"goals": goals, "commands": commands} | extra


def tasks_of(results: Results) -> tuple[dict[str, Task], EvalSettings]:
    """The tasks of an evaluation by kind, and its settings."""
    from transformers import AutoTokenizer

    from pyramid_vllm.tools.chat import stop_ids

    settings = EvalSettings(**results["settings"])
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tasks = make_tasks(settings, tokenizer, stop_ids(settings.model, tokenizer))
    return {task.kind: task for task in tasks}, settings
