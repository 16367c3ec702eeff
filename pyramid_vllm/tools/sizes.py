"""Bytes and seconds as people write them."""

import math
import re

BYTES = {"": 1.0, "b": 1.0, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_SECONDS = {"ms": 1e-3, "s": 1.0}


def quantity(text: str, units: dict[str, float]) -> float:
    """A number above 0 with one of the units; 0: the text is none."""
    found = re.fullmatch(r"([\d.]+(?:e\+?\d+)?)\s*([a-z]*)", text.strip().lower())
    try:
        value = float(found[1]) * units[found[2]] if found else 0.0
    except (KeyError, ValueError):
        return 0.0
    return value if value < math.inf else 0.0


def parse_bytes(text: str) -> int:
    """``80MiB`` as a number of bytes; ``ValueError`` if the text is no size."""
    size = int(quantity(text, BYTES))
    if not size:
        raise ValueError(
            f"memory is '{text}': valid are bytes, or a number with KiB, MiB or GiB"
        )
    return size


def parse_seconds(option: str, text: str) -> float:
    """``50ms`` or ``2s`` in seconds; ``ValueError`` if it is neither."""
    seconds = quantity(text, _SECONDS)
    if not seconds:
        raise ValueError(f"{option} is '{text}': valid are times like 50ms or 2s")
    return seconds


def format_bytes(size: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
