"""The highest rate at which latencies hold, and the devices that a load needs."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from pyramid_vllm.tools.bench.figures import Figures
from pyramid_vllm.tools.simulate.loads import Load

#: The highest rate is found to this ratio.
_PRECISION = 1.05
_MAX_DOUBLINGS = 8
_UNITS = {"ms": 1e-3, "s": 1.0}


def parse_seconds(option: str, text: str) -> float:
    """Read ``50ms`` or ``2s``.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"([0-9.]+)\s*(ms|s)", text.strip())
    try:
        seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"{option} is '{text}': valid are times like 50ms or 2s")
    return seconds


@dataclass(frozen=True)
class Objective:
    """Bounds of the 99th percentiles; None: not bounded."""

    ttft_s: float | None
    tpot_s: float | None

    def holds(self, figures: Figures) -> bool:
        """Whether a run meets it."""
        return all(
            bound is None or figures[f"{key}_p99_s"] <= bound
            for key, bound in (("ttft", self.ttft_s), ("tpot", self.tpot_s))
        )


@dataclass(frozen=True)
class Capacity:
    """What one engine carries of a load."""

    speed: float
    """Highest factor on the load's rate at which the objective holds, found to 5%; 0:
    it does not even hold for one request after the other."""
    rate: float
    """Requests a second at that speed."""
    num_engines: int | None
    """Engines that the load needs at its own rate; None: no number suffices."""


def check_arrivals(load: Load) -> None:
    """Check that a load has a rate that can be changed.

    Raises:
        ValueError: everything arrives at once, or clients wait for answers.
    """
    if load.num_clients is not None or load.rate == 0:
        raise ValueError(
            "--slo-ttft and --slo-tpot need arrivals: valid with them are --trace and "
            "--rate"
        )


def find_capacity(
    load: Load, objective: Objective, simulate: Callable[[Load], Figures]
) -> Capacity:
    """Bisect the speed of arrivals.

    Requests are taken to be spread over engines one by one, so that an engine of n
    gets a load like this one at 1/n of its rate.

    Args:
        load: with arrivals that are spread over time.
        objective: what must hold.
        simulate: runs a load on one engine.

    Raises:
        ValueError: everything arrives at once, or clients wait for answers.
    """
    check_arrivals(load)

    def holds(speed: float) -> bool:
        return objective.holds(simulate(load.scaled(speed)))

    low, high = _bracket(holds)
    if low == 0:
        return Capacity(0.0, 0.0, None)
    while high / low > _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    per_session = load.num_requests / len(load.sessions)
    return Capacity(low, low * load.rate * per_session, max(1, math.ceil(1 / low)))


def _bracket(holds: Callable[[float], bool]) -> tuple[float, float]:
    """A speed that holds and one, twice as high, that does not."""
    speed = 1.0
    if holds(speed):
        for _ in range(_MAX_DOUBLINGS):
            if not holds(2 * speed):
                return speed, 2 * speed
            speed *= 2
        return speed, speed
    for _ in range(_MAX_DOUBLINGS):
        speed /= 2
        if holds(speed):
            return speed, 2 * speed
    return 0.0, 0.0
