"""Tables of what an analysis found."""

from statistics import mean

import numpy as np
from rich.table import Table

from pyramid_vllm.tools.analysis.found import Found


def layer_table(found: Found) -> Table:
    """A row a layer: what cutting it costs, overlaps, the suggested share."""
    settings = found.settings
    table = Table(
        title="KL to the full cache, in nats a token, with one layer cut to a share; "
        "overlap of crucial tokens with earlier windows' choice; the suggestion"
    )
    table.add_column("layer", justify="right")
    for ratio in settings.ratios:
        table.add_column(f"{ratio:.0%} kept", justify="right")
    for distance in settings.distances:
        table.add_column(f"{distance} earlier", justify="right")
    table.add_column("suggested share", justify="right")
    costs, overlaps = found.costs[..., 1], np.mean(found.overlaps, axis=0)
    for layer, share in enumerate(found.shares):
        table.add_row(
            str(layer),
            *(f"{cost:.4f}" for cost in costs[:, layer]),
            *(f"{overlap:.0%}" for overlap in overlaps[:, layer]),
            f"{share:.0%}",
        )
    return table


def trial_table(trial: dict[str, list[dict[str, float]]]) -> Table:
    """A row a policy: what it costs on text that the suggestion was not made from."""
    table = Table(title="Policies at the same mean retention, on other windows")
    for column in ("", "loss, nats", "rise of it", "KL", "top-1 agreement"):
        table.add_column(column, justify="right")
    for name, costs in trial.items():
        loss = mean(cost["full_loss"] for cost in costs)
        rise = mean(cost["loss"] for cost in costs)
        table.add_row(
            name,
            f"{loss + rise:.3f}",
            f"{rise:+.4f} ({rise / loss:+.2%})",
            f"{mean(cost['divergence'] for cost in costs):.4f}",
            f"{mean(cost['agreement'] for cost in costs):.1%}",
        )
    return table
