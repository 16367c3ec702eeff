"""What happened between two readings."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pyramid_vllm.tools.monitor.scrape import Labels, Scrape


@dataclass(frozen=True)
class Span:
    """Counters as increases. Without an earlier reading nothing has increased yet."""

    before: Scrape | None
    after: Scrape

    @property
    def seconds(self) -> float:
        return self.after.taken - self.before.taken if self.before else 0.0

    @cached_property
    def is_restart(self) -> bool:
        """A counter fell: another server, whose counters all began at 0."""
        if self.before is None:
            return False
        return any(
            value < earlier.get(key, 0)
            for name, found in self.after.series.items()
            if name.endswith(("_total", "_count", "_bucket"))
            for earlier in [self.before.series.get(name, {})]
            for key, value in found.items()
        )

    def increases(self, name: str, where: Mapping[str, str]) -> dict[Labels, float]:
        """By series. One that is new began at 0 in between."""
        earlier = (
            self.before.series.get(name, {})
            if self.before and not self.is_restart
            else {}
        )
        found = self.after.select(name, where)
        return {key: value - earlier.get(key, 0) for key, value in found.items()}

    def increase(self, name: str, where: Mapping[str, str]) -> float | None:
        """Over all series; None if there is no interval, or no such counter."""
        found = self.increases(name, where)
        return sum(found.values()) if found and self.before else None

    def rate(self, name: str, where: Mapping[str, str]) -> float | None:
        """A second."""
        increase = self.increase(name, where)
        return None if increase is None else increase / self.seconds

    def rates_by(
        self, name: str, where: Mapping[str, str], label: str
    ) -> dict[str, float]:
        """A second, by the values of a label."""
        if self.before is None:
            return {}
        found = summed_by(self.increases(name, where), label)
        return {value: increase / self.seconds for value, increase in found.items()}

    def quantile(
        self, name: str, where: Mapping[str, str], share: float
    ) -> float | None:
        """Of a histogram's new values, evenly spread in their bucket.

        Of those beyond the last bound, that bound is all that is known.
        """
        if self.before is None:
            return None
        found = summed_by(self.increases(f"{name}_bucket", where), "le")
        buckets = sorted((float(bound), count) for bound, count in found.items())
        if not buckets or buckets[-1][1] <= 0:
            return None
        rank, low, below = share * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= rank and count > below:
                if math.isinf(bound):
                    break
                return low + (bound - low) * (rank - below) / (count - below)
            low, below = bound, count
        return low


def summed_by(series: Mapping[Labels, float], label: str) -> dict[str, float]:
    """Sums of series by the values of a label."""
    sums: dict[str, float] = defaultdict(float)
    for key, value in series.items():
        sums[dict(key).get(label, "")] += value
    return dict(sums)
