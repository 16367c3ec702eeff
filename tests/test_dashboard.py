"""Dashboard, alerts and ``pyramid-vllm top``, against metrics of an engine at work."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client import REGISTRY, generate_latest
from typer.testing import CliRunner

from pyramid_vllm.metrics.prometheus import COUNTERS, GAUGES, PREFIX
from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.monitor.scrape import Scrape, parse
from tests.engines import close, generate, make_llm, random_prompts
from tests.metrics_server import serving

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DASHBOARD = CONFIGS / "grafana/pyramid.json"
ALERTS = CONFIGS / "prometheus/alerts.yaml"
#: What Grafana puts in for its variables.
VARIABLES = {"$model_name": ".*", "$engine": ".*", "$__rate_interval": "1m"}
#: Prunes prompts and compresses generated tokens, so that every counter counts.
POLICY = {"recent_ratio": 0.1, "min_context": 32}


@dataclass(frozen=True)
class Selector:
    """A metric that a query reads, with every label that it names."""

    name: str
    labels: frozenset[str]


@dataclass
class Reader:
    """Collects selectors. An aggregation's labels count for all selectors inside it."""

    grouped: list[frozenset[str]] = field(default_factory=list)
    selectors: list[Selector] = field(default_factory=list)

    def enter(self, node: Any) -> None:
        if isinstance(node, promql.AggregateExpr):
            modifier = node.modifier
            labels = frozenset(modifier.labels if modifier else ())
            assert not modifier or modifier.type == promql.AggModifierType.By
            self.grouped.append(labels)
        elif isinstance(node, promql.VectorSelector):
            matched = {matcher.name for matcher in node.matchers.matchers}
            labels = frozenset(matched).union(*self.grouped)
            self.selectors.append(Selector(node.name, labels))

    def leave(self, node: Any) -> None:
        if isinstance(node, promql.AggregateExpr):
            self.grouped.pop()


def selectors(query: str) -> list[Selector]:
    """What a query reads; fails if it is no PromQL."""
    reader = Reader()
    promql.walk(promql.parse(query), reader.enter, reader.leave)
    return reader.selectors


def filled(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def panels() -> list[Any]:
    """All panels except rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def targets() -> list[Any]:
    return [
        pytest.param(target, id=f"{panel['title']}-{target['refId']}")
        for panel in panels()
        for target in panel["targets"]
    ]


def variable_queries() -> list[str]:
    """The variables, as queries for series."""
    queries = [
        variable["query"]["query"]
        for variable in dashboard()["templating"]["list"]
        if variable["type"] == "query"
    ]
    pattern = re.compile(r"label_values\((.*), (\w+)\)")
    found = [pattern.fullmatch(query) for query in queries]
    return [f"sum by ({m[2]}) ({filled(m[1])})" for m in found if m]


def alerts() -> list[Any]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def work(llm: Any) -> None:
    """Requests of every kind that the policy serves, and one of its own."""
    from vllm import SamplingParams

    generate(llm, random_prompts([400, 500, 20, 300]), 64)
    (prompt,) = random_prompts([200])
    for sampling in (
        SamplingParams(max_tokens=2, prompt_logprobs=0, detokenize=False),
        SamplingParams(
            max_tokens=2, extra_args={"kv_policy": "none"}, detokenize=False
        ),
    ):
        llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)


def metrics() -> str:
    return generate_latest(REGISTRY).decode()


def make_engine(model: str) -> Any:
    return make_llm(
        model,
        kv_policy="pyramidinfer",
        kv_policy_config=POLICY,
        disable_log_stats=False,
        max_num_batched_tokens=512,
    )


@pytest.fixture(scope="module")
def engine(tiny_llama: str) -> Iterator[Any]:
    llm = make_engine(tiny_llama)
    work(llm)
    yield llm
    close(llm)


@pytest.fixture(scope="module")
def scrape(engine: Any) -> Scrape:
    return parse(metrics(), time.monotonic())


def assert_is_there(selector: Selector, scrape: Scrape) -> None:
    series = scrape.series.get(selector.name)
    assert series, f"no series {selector.name}"
    for labels in series:
        missing = selector.labels - {name for name, _ in labels}
        assert not missing, f"{selector.name} has no label {', '.join(missing)}"


def test_queries_are_read_whole() -> None:
    query = 'sum by (le) (rate(a:b{c=~"d"}[1m])) / max by (x) (sum by (y) (e)) > f'
    assert selectors(query) == [
        Selector("a:b", frozenset({"le", "c"})),
        Selector("e", frozenset({"x", "y"})),
        Selector("f", frozenset()),
    ]
    with pytest.raises(ValueError, match="parenthesis"):
        selectors("sum(rate(a[1m])")


@pytest.mark.parametrize("target", targets())
def test_an_engine_has_every_metric_and_label_of_a_query(
    target: Any, scrape: Scrape
) -> None:
    found = selectors(filled(target["expr"]))
    assert found
    for selector in found:
        assert selector.labels >= {"model_name", "engine"}, "no variable's choice"
        assert_is_there(selector, scrape)
    legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    grouped = set(
        re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"])))
    )
    assert legend == grouped - {"le"}, "series that look alike, or names that are empty"


def test_an_engine_has_what_the_variables_offer(scrape: Scrape) -> None:
    queries = variable_queries()
    assert len(queries) == 2
    for query in queries:
        for selector in selectors(query):
            assert_is_there(selector, scrape)


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_engine_has_every_metric_and_label_of_an_alert(
    rule: Any, scrape: Scrape
) -> None:
    found = selectors(rule["expr"])
    assert found
    for selector in found:
        assert_is_there(selector, scrape)
    named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert named == {"model_name"} | found[0].labels


def test_what_an_engine_has_not_is_found(scrape: Scrape) -> None:
    with pytest.raises(AssertionError, match="no series"):
        assert_is_there(Selector("vllm:kv_policy_pages", frozenset()), scrape)
    wrong = Selector("vllm:kv_policy_pages_freed_total", frozenset({"tier", "kind"}))
    with pytest.raises(AssertionError, match="no label kind"):
        assert_is_there(wrong, scrape)


def test_every_metric_of_ours_is_shown() -> None:
    shown = " ".join(target.values[0]["expr"] for target in targets())
    ours = [f"{name}_total" for name in COUNTERS] + [*GAUGES, "info"]
    ours.append("compaction_time_seconds_bucket")
    for name in ours:
        assert f"{PREFIX}{name}{{" in shown, f"{name} is in no panel"


def test_panels_say_what_they_are_and_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place, title = panel["gridPos"], panel["title"]
        assert place["x"] + place["w"] <= 24, f"{title} is too wide"
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                other = taken.setdefault((x, y), title)
                assert other == title, f"{title} lies on {other}"
    for panel in panels():
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        sources = [panel, *panel["targets"]]
        assert {one["datasource"]["uid"] for one in sources} == {"${datasource}"}
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_top_shows_the_engine(engine: Any) -> None:
    """The figures of ``top`` are those of the engine's own counters."""

    def answer() -> tuple[int, str]:
        work(engine)
        return 200, metrics()

    with serving(answer) as url:
        arguments = [url, "--once", "--json", "--interval", "0.1"]
        result = CliRunner().invoke(app, ["top", *arguments])
        assert result.exit_code == 0, result.output
        picture = CliRunner().invoke(app, ["top", url, "--once", "--interval", "0.1"])
    shown = json.loads(result.output)
    (policy,) = shown["policies"]
    assert policy["kv_policy"] == "pyramidinfer"
    (one,) = shown["engines"]
    figures = one["figures"]
    assert None not in figures.values()
    assert set(figures["evicted_per_s_by_tier"]) == {
        str(tier) for tier in range(int(policy["tiers"]))
    }
    assert sum(figures["pages_freed_per_s_by_tier"].values()) > 0
    assert all(figures["compactions_per_s_by_kind"].values())
    assert 0 < figures["rows_computed_per_s"] < figures["rows_scheduled_per_s"]
    # `work` ran once between the two readings.
    tokens = figures["prompt_tokens_per_s"] * shown["seconds"]
    assert tokens == pytest.approx(400 + 500 + 20 + 300 + 2 * 200)
    assert {"pyramidinfer", "none"} <= set(figures["num_requests_by_policy"])
    assert picture.exit_code == 0
    assert max(map(len, picture.output.splitlines())) <= 80
