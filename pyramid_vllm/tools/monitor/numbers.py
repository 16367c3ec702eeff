"""Figures in few characters."""

UNKNOWN = "-"
_UNITS = ("", "k", "M", "G", "T")


def count(value: float | None) -> str:
    """At most 5 characters: ``0.25``, ``7``, ``1.2k``, ``345M``."""
    if value is None:
        return UNKNOWN
    if value < 10:
        return f"{value:.2f}".rstrip("0").rstrip(".")
    power = 0
    while value >= 999.5 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    digits = 1 if power and value < 9.95 else 0
    return f"{value:.{digits}f}{_UNITS[power]}"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0%}"


def seconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def by_size(values: dict[str, float]) -> str:
    """Largest first: ``12 pyramid, 3 none``."""
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count(value)} {name}" for name, value in ordered)
