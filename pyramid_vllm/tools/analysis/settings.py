"""What an analysis is asked for."""

from dataclasses import dataclass
from pathlib import Path

#: Queries of a window, when what windows choose is compared.
WINDOW = 64


@dataclass(frozen=True)
class AnalyzeSettings:
    """The options of the command."""

    model: str
    kv_policy: str
    kv_policy_config: str | None
    text: Path | None
    text_from: float
    text_to: float
    prompt_tokens: int
    target_tokens: int
    windows: int
    needles: int
    ratios: tuple[float, ...]
    distances: tuple[int, ...]
    retention: float | None
    falling: bool
    out: Path


def parse_ratios(text: str) -> tuple[float, ...]:
    """Shares, rising.

    Raises:
        ValueError: fewer than two, or none between 0 and 1.
    """
    try:
        values = tuple(sorted({float(value) for value in text.split(",")}))
    except ValueError:
        values = ()
    if len(values) < 2 or not (values[0] > 0 and values[-1] < 1):
        raise ValueError(
            f"ratios is '{text}': valid are at least two numbers between 0 and 1"
        )
    return values


def parse_distances(text: str, prompt_tokens: int) -> tuple[int, ...]:
    """Distances in tokens, rising.

    Raises:
        ValueError: they do not fit into the prompt.
    """
    most = prompt_tokens - 2 * WINDOW
    try:
        values = tuple(sorted({int(value) for value in text.split(",")}))
    except ValueError:
        values = ()
    if not values or values[0] < 1 or values[-1] > most:
        raise ValueError(
            f"distances is '{text}': valid are whole numbers from 1 to {most}, "
            f"prompt_tokens less two windows of {WINDOW}"
        )
    return values
