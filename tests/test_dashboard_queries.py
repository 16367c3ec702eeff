"""Queries of dashboard and alerts, evaluated by a Prometheus that scrapes an engine."""

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import close, generate, random_prompts
from tests.metrics_server import serving
from tests.test_dashboard import (
    ALERTS,
    alerts,
    filled,
    make_engine,
    metrics,
    panels,
    variable_queries,
)
from tests.test_dashboard import work as run_requests

PROMETHEUS = shutil.which("prometheus")
START_UP_S = 60
SCRAPES_S = 30
SCRAPE_INTERVAL = "500ms"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        PROMETHEUS is None, reason="no prometheus on the PATH, as Debian's package has"
    ),
]

#: Panels that have nothing to show of an engine that prunes prompts.
EMPTY = {"Prefix cache hits"}


class Prometheus:
    """A server's HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, query: str) -> list[Any]:
        """Current series, each with its labels and value."""
        words = urllib.parse.urlencode({"query": query})
        return list(self._get(f"query?{words}")["result"])

    def alerting_rules(self) -> list[Any]:
        """Alerting rules with their state and health."""
        groups = self._get("rules?type=alert")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _get(self, call: str) -> Any:
        try:
            with urllib.request.urlopen(
                f"{self._url}/api/v1/{call}", timeout=10
            ) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{call}: {error.read().decode()}") from error

    def values(self, query: str) -> list[float]:
        return [float(series["value"][1]) for series in self.query(query)]

    def wait_for_numbers(self, query: str, seconds: float = SCRAPES_S) -> list[float]:
        """A query's largest values so far, once there are some.

        A rate needs two scrapes; a share has nothing to say of an idle engine.
        """
        query = f"max_over_time(({query})[5m:{SCRAPE_INTERVAL}])"
        deadline = time.monotonic() + seconds
        while True:
            try:
                values = self.values(query)
            except OSError:
                values = []
            if values and all(map(math.isfinite, values)):
                return values
            assert time.monotonic() < deadline, f"{query} is {values}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def prometheus(
    tiny_llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A Prometheus that has seen the engine work between two scrapes."""
    folder = tmp_path_factory.mktemp("prometheus")
    llm = make_engine(tiny_llama)
    with serving(lambda: (200, metrics())) as url:
        process, server = start(folder, url)
        try:
            server.wait_for_numbers("vllm:kv_policy_info", START_UP_S)
            run_requests(llm)
            # What the first requests brought about needs another scrape to have a rate.
            server.wait_for_numbers("vllm:kv_policy_requests_unpruned_total > 0")
            run_requests(llm)
            generate(llm, random_prompts([20] * 16), 2)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)
            close(llm)


def start(folder: Path, url: str) -> tuple[subprocess.Popen[bytes], Prometheus]:
    """A server that scrapes this address twice a second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    target = url.removeprefix("http://")
    config = {
        "global": {
            "scrape_interval": SCRAPE_INTERVAL,
            "evaluation_interval": SCRAPE_INTERVAL,
        },
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": [target]}]}
        ],
    }
    # JSON is YAML.
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = [str(PROMETHEUS), f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    return process, Prometheus(f"http://{address}")


def test_every_query_has_a_number(prometheus: Prometheus) -> None:
    for panel in panels():
        for target in panel["targets"]:
            query = filled(target["expr"])
            if panel["title"] in EMPTY:
                assert prometheus.values(query) == []
            else:
                prometheus.wait_for_numbers(query)


def test_figures_that_the_policy_sets_are_its_own(prometheus: Prometheus) -> None:
    """The engine prunes, so it computes fewer rows than are scheduled, and it frees
    pages."""
    by_title = {panel["title"]: panel["targets"] for panel in panels()}

    def values(title: str) -> list[float]:
        return prometheus.wait_for_numbers(filled(by_title[title][0]["expr"]))

    (computed,) = values("Prompt rows computed")
    assert 0 < computed < 1
    assert sum(values("Pages freed")) > 0
    assert len(values("Compactions")) == 2
    assert values("Compaction time of a step")[0] > 0


def test_variables_offer_the_engine(prometheus: Prometheus) -> None:
    for query in variable_queries():
        (series,) = prometheus.query(query)
        assert all(series["metric"].values())


def test_alerts_are_evaluated_and_quiet(prometheus: Prometheus) -> None:
    """No alert fires except the one which says that most requests are short."""
    prometheus.wait_for_numbers('ALERTS{alertname="KVPolicyHardlyUsed"}')
    rules = {rule["name"]: rule for rule in prometheus.alerting_rules()}
    assert set(rules) == {rule["alert"] for rule in alerts()}
    for name, rule in rules.items():
        assert rule["health"] == "ok", f"{name}: {rule.get('lastError')}"
        state = "pending" if name == "KVPolicyHardlyUsed" else "inactive"
        assert rule["state"] == state, name
