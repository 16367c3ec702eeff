"""Pictures of an evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyramid_vllm.tools.plotting import new_figure
from pyramid_vllm.tools.quality.report import Outcome
from pyramid_vllm.tools.quality.tasks import Task


def plot_losses(outcomes: Sequence[Outcome], path: Path) -> None:
    """Loss against memory, one curve a policy."""
    figure = new_figure(figsize=(7, 4.5))
    axes = figure.subplots()
    full, *others = [
        (figures["kv_share"], figures["loss"]["value"])
        for figures in (outcome.summary["continuation"] for outcome in outcomes)
    ]
    axes.axhline(full[1], color="0.6", linestyle="--", linewidth=1, label="full cache")
    labels = [outcome.side.label for outcome in outcomes[1:]]
    for label in dict.fromkeys(labels):
        points = [p for p, own in zip(others, labels, strict=True) if own == label]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set_xlabel("KV bytes of a request, share of the full cache's")
    axes.set_ylabel("loss, nats per token")
    axes.set_xlim(0, 1.05)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_retrieval(
    outcomes: Sequence[Outcome], tasks: Sequence[Task], path: Path
) -> None:
    """Scores by length and depth: a row a task, a column a retention.

    Args:
        outcomes: the full cache's and one policy's.
        tasks: of retrieval.
        path: of the picture.
    """
    kinds = list(dict.fromkeys(task.cells[0]["task"] for task in tasks))
    size = (1 + 2.6 * len(outcomes), 0.8 + 2.2 * len(kinds))
    figure = new_figure(figsize=size)
    grid = figure.subplots(len(kinds), len(outcomes), squeeze=False)
    for row, kind in zip(grid, kinds, strict=True):
        own = [task for task in tasks if task.cells[0]["task"] == kind]
        row[0].set_ylabel(f"{kind.replace('_', ' ')}\ndepth")
        for axes, outcome in zip(row, outcomes, strict=True):
            image = _heat_map(axes, own, outcome)
    for axes, outcome in zip(grid[0], outcomes, strict=True):
        axes.set_title(f"{outcome.side.label} {outcome.side.asked}")
    figure.colorbar(image, ax=grid, label="share of right answers", shrink=0.8)
    figure.savefig(path, dpi=150)


def _heat_map(axes: Any, tasks: Sequence[Task], outcome: Outcome) -> Any:
    columns = [outcome.summary[task.name]["by_depth"] for task in tasks]
    scores = [[cell["score"] for cell in row] for row in zip(*columns, strict=True)]
    image = axes.imshow(scores, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(tasks)), [t.cells[0]["num_tokens"] for t in tasks])
    axes.set_yticks(range(len(scores)), [f"{c['depth']:g}" for c in columns[0]])
    axes.set_xlabel("tokens")
    for y, line in enumerate(scores):
        for x, value in enumerate(line):
            color = "black" if value > 0.6 else "white"
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", color=color)
    return image
