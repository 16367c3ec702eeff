"""The highest rate at which latencies hold, and the devices that a load needs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from pyramid_vllm.tools.figures import Figures
from pyramid_vllm.tools.simulate.loads import Load

#: The search ends when its bounds differ by this ratio.
_PRECISION = 1.05
_MAX_DOUBLINGS = 8


@dataclass(frozen=True)
class Capacity:
    """The part of a load that one engine can serve."""

    speed: float
    """Highest factor on the load's rate at which the objective holds, found to 5%; 0:
    it does not even hold for one request after the other."""
    rate: float
    """Requests a second at that speed."""
    num_engines: int | None
    """Engines that the load needs at its own rate; None: no number suffices."""


def check_arrivals(load: Load) -> None:
    """Check that a load has a rate that can be changed; ``ValueError`` if everything
    arrives at once, or clients wait for answers."""
    if load.num_clients is not None or load.rate == 0:
        raise ValueError(
            "--slo-ttft and --slo-tpot need arrivals: valid with them are --trace and "
            "--rate"
        )


def find_capacity(
    load: Load, objective: Figures, simulate: Callable[[Load], Figures]
) -> Capacity:
    """Bisect the speed of arrivals.

    Requests are taken to be spread over engines one by one, so that an engine of n
    gets a load like this one at 1/n of its rate.

    Args:
        load: with arrivals that are spread over time; see ``check_arrivals``.
        objective: bounds of figures, by their keys.
        simulate: runs a load on one engine.
    """
    check_arrivals(load)

    def holds(speed: float) -> bool:
        figures = simulate(load.scaled(speed))
        return all(figures[key] <= bound for key, bound in objective.items())

    speed, holds_at_first = 1.0, holds(1.0)
    factor = 2.0 if holds_at_first else 0.5
    for _ in range(_MAX_DOUBLINGS):
        speed *= factor
        if holds(speed) is not holds_at_first:
            low, high = sorted((speed, speed / factor))
            break
    else:
        if not holds_at_first:
            return Capacity(0.0, 0.0, None)
        low = high = speed
    while high / low > _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    per_session = load.num_requests / len(load.sessions)
    return Capacity(low, low * load.rate * per_session, max(1, math.ceil(1 / low)))
