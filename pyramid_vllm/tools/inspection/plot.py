"""The picture: tokens by layer."""

from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyramid_vllm.tools.inspection.view import Inspection
from pyramid_vllm.tools.plotting import new_figure


def kept_shares(inspection: Inspection) -> npt.NDArray[np.float64]:
    """``[num_layers, num_computed]``: share of a layer's KV heads that keep a token."""
    shares = np.zeros((len(inspection.layers), inspection.num_computed))
    for row, layer in zip(shares, inspection.layers, strict=True):
        row[list(layer.positions)] = layer.heads
    return shares / inspection.num_kv_heads


def tier_runs(inspection: Inspection) -> list[tuple[int, int, int]]:
    """Runs of neighbouring layers of one tier: tier, first layer, last layer."""
    runs = []
    for tier, layers in groupby(inspection.layers, key=lambda layer: layer.tier):
        members = [layer.layer for layer in layers]
        runs.append((tier, members[0], members[-1]))
    return runs


def plot(inspection: Inspection, path: Path) -> None:
    """Draw which tokens are kept: a column a token, a row a layer, tiers beside."""
    size = (12, max(3.0, 1.6 + 0.18 * len(inspection.layers)))
    figure = new_figure(figsize=size)
    strip, axes = figure.subplots(1, 2, width_ratios=(1, 40), sharey=True)
    image = axes.imshow(
        kept_shares(inspection),
        vmin=0,
        vmax=1,
        cmap="Blues",
        aspect="auto",
        interpolation="nearest",
    )
    tiers = [[layer.tier % 9] for layer in inspection.layers]
    strip.imshow(tiers, cmap="Pastel1", vmin=0, vmax=8, aspect="auto")
    for tier, first, last in tier_runs(inspection):
        middle = (first + last) / 2
        strip.text(0, middle, str(tier), ha="center", va="center", fontsize=8)
        for part in (strip, axes) if first else ():
            part.axhline(first - 0.5, color="0.4", linewidth=0.6)
    prompt = inspection.num_prompt
    marks = {
        inspection.sinks: ("sinks", "right"),
        prompt - inspection.recent: ("recent window", "left"),
        prompt: ("generated", "left"),
    }
    for position, (label, side) in marks.items():
        if 0 < position < inspection.num_computed:
            axes.axvline(position - 0.5, color="tab:orange", linewidth=1)
            place = {"x": position - 0.5, "y": -0.6, "ha": side}
            axes.text(s=label, fontsize=8, color="tab:orange", **place)
    strip.set_xticks([0], ["tier"])
    strip.set_ylabel("layer (with full attention)")
    axes.set_xlabel("token position")
    share = inspection.kv_bytes / inspection.stock_kv_bytes
    axes.set_title(
        f"policy {inspection.policy['name']}: prompt of {prompt} tokens, "
        f"{share:.0%} of stock vLLM's KV bytes",
        pad=20,
    )
    figure.colorbar(image, ax=axes, label="share of KV heads that keep it", pad=0.01)
    figure.savefig(path, dpi=150)
