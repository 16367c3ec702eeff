"""One reading of a server's metrics."""

import http.client
import math
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 5.0

#: Names and values, sorted.
Labels = tuple[tuple[str, str], ...]


class ScrapeError(Exception):
    """There is no reading, and why."""


@dataclass(frozen=True)
class Scrape:
    """Series by name and labels, and when they were read."""

    #: Seconds of a clock that never goes back.
    taken: float
    series: Mapping[str, Mapping[Labels, float]]

    @property
    def has_vllm(self) -> bool:
        return any(name.startswith("vllm:") for name in self.series)

    @property
    def has_policy(self) -> bool:
        return any(name.startswith("vllm:kv_policy_") for name in self.series)

    def select(self, name: str, where: Mapping[str, str]) -> dict[Labels, float]:
        """The series of a name that carry all of these labels."""
        wanted = set(where.items())
        found = self.series.get(name, {})
        return {key: value for key, value in found.items() if wanted <= set(key)}

    def gauges(self, name: str, where: Mapping[str, str]) -> dict[Labels, float]:
        """A gauge's series, one for those that differ in ``pid`` alone.

        Several front ends may report one engine, and none says which is the newest:
        the largest counts.
        """
        largest: dict[Labels, float] = {}
        for key, value in self.select(name, where).items():
            key = tuple(label for label in key if label[0] != "pid")
            largest[key] = max(value, largest.get(key, -math.inf))
        return largest


def metrics_url(url: str) -> str:
    """The address of the metrics of a server, given with or without ``/metrics``.

    Raises:
        ValueError: If it is no address of a server.
    """
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_valid = is_valid and (parts.port is None or parts.port > 0)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"'URL' is {url!r}: valid are http://HOST:PORT and https://HOST:PORT, "
            "with or without /metrics"
        )
    path = parts.path.rstrip("/").removesuffix("/metrics") + "/metrics"
    return urlunsplit(parts._replace(path=path, fragment=""))


def parse(text: str, taken: float) -> Scrape:
    """Read Prometheus' text format; ``ScrapeError`` if it is none."""
    series: dict[str, dict[Labels, float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not math.isnan(sample.value):
                    key = tuple(sorted(sample.labels.items()))
                    series[sample.name][key] = sample.value
    except (ValueError, IndexError, KeyError) as error:
        raise ScrapeError("what is there are no Prometheus metrics") from error
    return Scrape(taken=taken, series=dict(series))


def fetch(url: str, timeout: float = TIMEOUT_S) -> Scrape:
    """Read the metrics at an address that ``metrics_url`` gave."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            body = response.read()
    except urllib.error.HTTPError as error:
        raise ScrapeError(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise ScrapeError(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise ScrapeError(str(error) or type(error).__name__) from error
    return parse(body.decode("utf-8", errors="replace"), time.monotonic())
