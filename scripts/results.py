"""Writes docs/results.json and docs/results.md."""

import json
import statistics
from pathlib import Path
from typing import Any

from goals import DEFAULT, Results, load, needles

_INTRODUCTION = """# Results

Made by `scripts/reproduce`; `docs/results.json` holds the same figures. Intervals are
95% bootstrap intervals over windows or needles, and ranges over repeats for speeds.
Speeds are measured with prefix caching off on both sides.
Finished steps are kept from run to run: the commit is that of the last run.
"""


def write_results(
    docs: Path, found: Results, done: dict[str, Any], origin: Results
) -> None:
    """Write both files.

    Args:
        docs: the folder.
        found: from ``goals.collect``.
        done: steps by name.
        origin: where the figures come from.
    """
    text = json.dumps(found | {"provenance": origin}, indent=2)
    (docs / "results.json").write_text(text + "\n", encoding="utf-8")
    parts = [_INTRODUCTION, _origin(origin), _goals(found["goals"])]
    for name, title in (
        ("quality", "SmolLM2-135M"),
        ("quality-second", "Second model"),
    ):
        if name in done:
            parts.append(_quality(title, load(done[name])))
    if "peers" in found:
        parts.append(_peers(found["peers"]))
    for name in ("one-prompt", "batch"):
        if name in done:
            parts.append(_bench(name, load(done[name])))
    parts.append(_commands(found["commands"]))
    (docs / "results.md").write_text("\n".join(parts), encoding="utf-8")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _origin(origin: Results) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in origin["versions"].items())
    return (
        f"{origin['date'][:10]}, commit {origin['commit'][:12]}, {versions}, seed "
        f"{origin['seed']}, {origin['machine']}; text: {origin['text']}.\n"
    )


def _goals(goals: list[Results]) -> str:
    rows = []
    for goal in goals:
        low_high = goal["interval"]
        interval = "" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}"
        rows.append(
            [
                goal["name"],
                goal["goal"],
                f"{goal['value']:.3f}",
                interval,
                "met" if goal["met"] else "**not met**",
            ]
        )
    header = ["figure", "goal", "value", "interval", ""]
    return f"## Goals\n\n{table(header, rows)}"


def _quality(title: str, results: Results) -> str:
    rows = []
    for side in results["sides"]:
        tasks = side["tasks"]
        text = tasks["continuation"]["summary"]
        rise = text["loss_difference_share"]
        rows.append(
            [
                side["label"],
                "" if side["retention"] is None else f"{side['retention']:g}",
                f"{text['kv_share']:.1%}",
                f"{text['loss']['value']:.3f}",
                f"{rise['value']:+.2%} ({rise['low']:+.2%} to {rise['high']:+.2%})",
                f"{text['divergence']['value']:.4f}",
                f"{text['top_agreement']['value']:.1%}",
                f"{statistics.mean(needles(tasks)):.0%}",
            ]
        )
    header = ["policy", "retention", "KV bytes", "loss, nats", "rise of it", "KL, nats"]
    header += ["same top token", "needles"]
    settings = results["settings"]
    lengths = f"{settings['windows']} windows of {settings['prompt_tokens']} + "
    lengths += f"{settings['target_tokens']} tokens"
    return f"## Quality: {title}, {lengths}\n\n{table(header, rows)}"


def _peers(figures: Results) -> str:
    rows = [
        [
            name,
            f"{press['kept_tokens']:.0f}",
            f"{press['share']['value']:+.2%} "
            f"({press['share']['low']:+.2%} to {press['share']['high']:+.2%})",
            f"{statistics.mean(press['scores']):.0%}",
        ]
        for name, press in figures.items()
    ]
    header = ["press", "tokens kept a layer", "rise of the loss", "needles"]
    title = "## kvpress, the same windows, needles and share kept"
    return f"{title}\n\n{table(header, rows)}"


def _bench(name: str, results: Results) -> str:
    rows = []
    for point in results["points"]:
        stock, ours = point["sides"]["none"], point["sides"][DEFAULT]
        for key, label in (
            ("total_tokens_per_s", "tokens/s"),
            ("ttft_p50_s", "TTFT p50, s"),
            ("tpot_p50_s", "TPOT p50, s"),
            ("max_num_running", "most at once"),
            ("num_preemptions", "preemptions"),
            ("kv_bytes_per_request", "KV bytes a request"),
        ):
            ratio = ours[key]["ratio"]
            spread = "-"
            if ratio is not None:
                spread = (
                    f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
                )
            rows.append(
                [
                    f"{point['label']}, {_binds(point)}",
                    label,
                    f"{stock[key]['median']:,.2f}",
                    f"{ours[key]['median']:,.2f}",
                    spread,
                ]
            )
    header = ["KV memory", "figure", "stock vLLM", DEFAULT, "ratio"]
    return f"## Speed: {name}\n\n{table(header, rows)}{_ceiling(results)}"


def _ceiling(results: Results) -> str:
    """What memory without end would gain, where both kinds of points are there."""
    speeds: dict[bool, float] = {}
    for point in results["points"]:
        speed = point["sides"]["none"]["total_tokens_per_s"]["median"]
        binds = point["memory_binds"]
        speeds[binds] = max(speed, speeds.get(binds, 0.0))
    if len(speeds) < 2:
        return ""
    return (
        "\nStock vLLM itself, with memory that does not bind, is "
        f"{speeds[False] / speeds[True]:.2f} times as fast as with memory that does: "
        "on this machine more sequences at once can gain no more than that.\n"
    )


def _binds(point: Results) -> str:
    return "binds" if point["memory_binds"] else "does not bind"


def _commands(commands: dict[str, str]) -> str:
    lines = "".join(f"- {name}: `{text}`\n" for name, text in commands.items())
    return f"## Commands\n\n{lines}"
