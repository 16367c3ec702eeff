"""Figures to draw on. matplotlib is an extra, imported where something is drawn."""

from importlib.util import find_spec
from typing import Any


def check_matplotlib() -> None:
    """Refuse before anything runs where figures cannot be drawn.

    Raises:
        RuntimeError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise RuntimeError(
            "plots need matplotlib, which is not installed: "
            "pip install 'pyramid-vllm[plots]'"
        )


def new_figure(**settings: Any) -> Any:
    """matplotlib's, outside of pyplot: no display, and nothing to close.

    Args:
        settings: of ``Figure``.
    """
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **settings)
