"""One reading of a server's metrics."""

import http.client
import math
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families
from pydantic import HttpUrl, TypeAdapter, ValidationError

TIMEOUT_S = 5.0

#: Names and values, sorted.
Labels = tuple[tuple[str, str], ...]


class ScrapeError(Exception):
    """There is no reading; the message says why."""


@dataclass(frozen=True)
class Scrape:
    """Series by name and labels, and when they were read."""

    #: Seconds of a monotonic clock.
    taken: float
    series: Mapping[str, Mapping[Labels, float]]

    def select(self, name: str, where: Mapping[str, str]) -> dict[Labels, float]:
        """The series of a name that carry all of these labels."""
        found = self.series.get(name, {})
        return {k: value for k, value in found.items() if where.items() <= set(k)}


def metrics_url(url: str) -> str:
    """The address of the metrics of a server, given with or without ``/metrics``.

    Raises:
        ValueError: it is no address of a server.
    """
    try:
        parts = urlsplit(str(TypeAdapter(HttpUrl).validate_python(url)))
    except ValidationError:
        raise ValueError(
            f"'URL' is {url!r}: valid are http://HOST:PORT and https://HOST:PORT, "
            "with or without /metrics"
        ) from None
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
        raise ScrapeError("the answer holds no Prometheus metrics") from error
    return Scrape(taken=taken, series=dict(series))


def fetch(url: str, timeout: float = TIMEOUT_S) -> Scrape:
    """Read the metrics at an address that ``metrics_url`` gave."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ScrapeError(f"{url}: {str(error) or type(error).__name__}") from error
    return parse(body.decode("utf-8", errors="replace"), time.monotonic())
