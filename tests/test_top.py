"""``pyramid-vllm top``, against metrics without an engine."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.monitor.figures import Span, server_figures
from pyramid_vllm.tools.monitor.scrape import (
    Scrape,
    ScrapeError,
    fetch,
    metrics_url,
    parse,
)
from pyramid_vllm.tools.monitor.top import pictures, show_live
from pyramid_vllm.tools.monitor.view import picture, shown
from tests.metrics_server import INFO, FakeMetrics, serving, work


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["top", *arguments], env={"COLUMNS": "80"})


def after_work(metrics: FakeMetrics, interval: float = 2.0, **how: Any) -> Span:
    """One interval in which every engine of these works once."""
    before = parse(metrics.text(), taken=10.0)
    for engine in range(len(before.series["vllm:num_requests_running"])):
        work(metrics, engine, **how)
    return Span(before, parse(metrics.text(), taken=10.0 + interval))


def drawn(server: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, height=100, force_terminal=False)
    with console.capture() as captured:
        console.print(picture({"url": "http://127.0.0.1:8000"} | server))
    return captured.get()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/metrics"),
        ("http://host:8000/", "http://host:8000/metrics"),
        ("https://host/metrics", "https://host/metrics"),
        ("http://host/v/metrics/", "http://host/v/metrics"),
        ("http://[::1]:8000", "http://[::1]:8000/metrics"),
    ],
)
def test_addresses_go_with_or_without_metrics(url: str, address: str) -> None:
    assert metrics_url(url) == address


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:99999"]
)
def test_a_bad_address_is_refused(url: str) -> None:
    result = run(url, "--once")
    assert result.exit_code == 2
    assert "'URL' is" in result.output
    assert "http://HOST:PORT" in result.output


@pytest.mark.parametrize("interval", ["0", "-1", "1e9"])
def test_a_bad_interval_is_refused(interval: str) -> None:
    result = run("--once", "--interval", interval)
    assert result.exit_code == 2
    assert "'--interval'" in result.output
    assert "3600" in result.output if interval == "1e9" else "0.1" in result.output


def test_json_goes_with_once_alone() -> None:
    result = run("--json")
    assert result.exit_code == 2
    assert "valid only with --once" in result.output


def test_figures_are_those_of_the_interval() -> None:
    """Counters count their growth since the first reading; gauges are as they are."""
    metrics = FakeMetrics()
    work(metrics)
    server = server_figures(after_work(metrics, interval=4.0))
    figures = server["total"]
    assert (figures["num_running"], figures["num_waiting"]) == (12, 3)
    assert figures["num_above_stock"] == 5
    assert figures["entries_held"] / figures["entries_represented"] == pytest.approx(
        0.4
    )
    assert figures["prompt_tokens_per_s"] == pytest.approx(1000)
    assert figures["preemptions_per_s"] == pytest.approx(0.25)
    assert figures["evicted_per_s_by_tier"] == {"0": 250, "1": 500, "2": 750}
    assert figures["pages_freed_per_s_by_tier"] == {"0": 7.5, "1": 15, "2": 22.5}
    assert figures["compactions_per_s_by_kind"] == {"prompt": 2, "generation": 0.5}
    assert figures["rows_computed_per_s"] / figures[
        "rows_scheduled_per_s"
    ] == pytest.approx(0.75)
    assert figures["compaction_mean_s"] == pytest.approx(0.0095 / 4)
    # These are totals since the server began.
    assert figures["num_requests_by_policy"] == {"pyramid": 18, "none": 2}
    assert figures["num_unpruned_by_reason"] == {"prompt_logprobs": 4}
    assert (figures["num_refused"], figures["num_capped"]) == (2, 4)
    assert server["policies"] == [INFO]


@pytest.mark.parametrize(
    ("values", "quantile"),
    [
        # 19 of 20 below 1 ms: the rank is the first bucket's end.
        ([0.0005] * 19 + [0.05], 0.001),
        # All in one bucket, from 1 to 10 ms: 95% of the way through it.
        ([0.005] * 4, 0.001 + 0.95 * 0.009),
        # After the last bound nothing more is known.
        ([5.0] * 3, 0.1),
    ],
)
def test_a_quantile_is_that_of_the_new_values(
    values: list[float], quantile: float
) -> None:
    metrics, name = FakeMetrics(), "vllm:kv_policy_compaction_time_seconds"
    metrics.observe(name, *[0.0001] * 1000)
    before = parse(metrics.text(), taken=0)
    metrics.observe(name, *values)
    span = Span(before, parse(metrics.text(), taken=1))
    assert span.p95(name, {}) == pytest.approx(quantile)


def test_an_idle_interval_has_no_times() -> None:
    metrics = FakeMetrics()
    work(metrics)
    span = Span(parse(metrics.text(), 0), parse(metrics.text(), 1))
    figures = server_figures(span)["total"]
    assert figures["compaction_mean_s"] is None
    assert figures["compaction_p95_s"] is None
    assert figures["rows_scheduled_per_s"] == 0
    assert figures["prompt_tokens_per_s"] == 0


def test_counters_of_a_new_server_begin_at_zero() -> None:
    """This also holds for those that have already passed what the old server had
    counted."""
    old, new = FakeMetrics(), FakeMetrics()
    work(old)
    work(old)
    old_text = old.text()
    work(new)
    new.add("vllm:generation_tokens", 1500)
    span = Span(parse(old_text, 0), parse(new.text(), 1))
    server = server_figures(span)
    assert server["is_restart"]
    assert server["total"]["prompt_tokens_per_s"] == 4000
    assert server["total"]["generation_tokens_per_s"] == 2000
    assert "restarted" in drawn(server)
    assert not server_figures(after_work(new))["is_restart"]


def test_one_reading_has_no_rates() -> None:
    metrics = FakeMetrics()
    work(metrics)
    server = server_figures(Span(None, parse(metrics.text(), 0)))
    assert server["total"]["num_running"] == 12
    assert server["total"]["prompt_tokens_per_s"] is None
    assert server["total"]["evicted_per_s_by_tier"] == {}
    assert not server["is_restart"]
    assert "rates to come" in drawn(server)


def test_engines_add_up() -> None:
    metrics = FakeMetrics(num_engines=11)
    server = server_figures(after_work(metrics))
    assert [engine["engine"] for engine in server["engines"]] == [
        str(i) for i in range(11)
    ]
    assert {engine["figures"]["num_running"] for engine in server["engines"]} == {12}
    assert server["total"]["num_running"] == 132
    assert server["total"]["prompt_tokens_per_s"] == pytest.approx(11 * 2000)
    # Shares do not add up.
    assert server["total"]["kv_usage"] == pytest.approx(0.93)
    assert server["total"]["entries_held"] / server["total"][
        "entries_represented"
    ] == pytest.approx(0.4)


def test_front_ends_that_report_one_engine_count_once() -> None:
    """Their gauges report one thing; their counters report different requests."""
    metrics = FakeMetrics(extra_labels=("pid",))
    before = parse(metrics.text(), 0)
    for pid, running in (("7", 3), ("8", 5)):
        metrics.set("vllm:num_requests_running", running, pid=pid)
        metrics.add("vllm:prompt_tokens", 100, pid=pid)
    server = server_figures(Span(before, parse(metrics.text(), 1)))
    assert server["total"]["num_running"] == 5
    assert server["total"]["prompt_tokens_per_s"] == 200


def test_metrics_that_are_none_are_refused() -> None:
    with pytest.raises(ScrapeError, match="no Prometheus metrics"):
        parse("<html><body>Hello</body></html>", 0)
    assert parse("a NaN\nb 1\n", 0).series == {"b": {(): 1.0}}


def test_a_picture_fits_80_columns_and_24_lines() -> None:
    server = server_figures(after_work(FakeMetrics()))
    lines = drawn(server).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert ["prompt", "tokens/s", shown(2000)] in [row[:3] for row in rows]
    assert [row[-3:] for row in rows if row[-3:-2] == ["2"]] == [["2", "1.5k", "45"]]


def test_every_engine_and_tier_is_drawn() -> None:
    metrics = FakeMetrics(num_engines=2)
    server = server_figures(after_work(metrics, num_tiers=80, interval=1.0))
    text = drawn(server, 160)
    for word in ("tiny 0", "tiny 1", "all", "preemptions/s", "unpruned by reason"):
        assert word in text
    tiers = [line.split()[-3] for line in text.splitlines() if line.strip()]
    assert tiers[-80:] == [str(tier) for tier in range(80)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (0.254, "0.254"),
        (0.00234, "0.00234"),
        (999.4, "999"),
        (999.6, "1k"),
        (12_345, "12.3k"),
        (999_600, "1M"),
        (3e9, "3G"),
        (5e15, "5000T"),
        ({"a": 1, "b": 30}, "30 b, 1 a"),
        ({}, "-"),
    ],
)
def test_figures_are_short(value: float | dict[str, float] | None, text: str) -> None:
    assert shown(value) == text


@pytest.fixture
def busy() -> Iterator[tuple[FakeMetrics, str]]:
    """A server whose engine works between any two readings."""
    metrics = FakeMetrics()

    def answer() -> tuple[int, str]:
        work(metrics)
        return 200, metrics.text()

    with serving(answer) as url:
        yield metrics, url


def test_once_prints_one_picture(busy: tuple[FakeMetrics, str]) -> None:
    result = run(busy[1], "--once", "--interval", "0.1")
    assert result.exit_code == 0, result.output
    assert "kv_policy=pyramid, retention=0.4" in result.output
    assert "rows computed/s" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_once_as_json_has_every_figure(busy: tuple[FakeMetrics, str]) -> None:
    result = run(busy[1], "--once", "--json", "--interval", "0.1")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output)
    assert shown["url"] == f"{busy[1]}/metrics"
    assert shown["policies"] == [INFO]
    assert shown["seconds"] >= 0.1
    (engine,) = shown["engines"]
    assert (engine["model_name"], engine["engine"]) == ("tiny", "0")
    assert engine["figures"] == shown["total"]
    freed = shown["total"]["pages_freed_per_s_by_tier"]
    assert freed["2"] == pytest.approx(90 / shown["seconds"])
    assert None not in shown["total"].values()


def test_a_server_without_a_policy_is_said() -> None:
    stock = FakeMetrics(has_policy=False)
    with serving(lambda: (200, stock.text())) as url:
        result = run(url, "--once")
        assert result.exit_code == 1
        assert "vLLM without a KV policy" in " ".join(result.output.split())
    with serving(lambda: (200, "python_info 1\n")) as url:
        result = run(url, "--once")
        assert result.exit_code == 1
        assert "no vLLM metrics there" in " ".join(result.output.split())


def test_a_server_that_does_not_answer_is_said() -> None:
    with serving(lambda: (503, "")) as url:
        result = run(url, "--once")
        assert result.exit_code == 1
        assert "503" in result.output
    result = run(url, "--once")
    assert result.exit_code == 1
    assert f"{url}/metrics:" in result.output
    with pytest.raises(ScrapeError):
        fetch(f"{url}/metrics")


def test_a_live_view_goes_on_whatever_the_server_does() -> None:
    """Rates are back with the first reading behind an outage."""
    answers: list[tuple[int, str]] = []
    policy, stock = FakeMetrics(), FakeMetrics(has_policy=False)
    console = Console(width=80, height=24, force_terminal=False)
    with serving(lambda: answers[-1]) as url:
        readings = pictures(f"{url}/metrics")

        def see(status: int, text: str) -> str:
            answers.append((status, text))
            with console.capture() as captured:
                console.print(next(readings))
            return captured.get()

        assert "500" in see(500, "")
        assert "rates to come" in see(200, policy.text())
        work(policy)
        assert "over" in see(200, policy.text())
        assert "500" in see(500, "")
        assert "without a KV policy" in see(200, stock.text())
        work(policy)
        assert "over" in see(200, policy.text())


def test_ctrl_c_ends_a_live_view(busy: tuple[FakeMetrics, str]) -> None:
    console = Console(width=80, height=24, force_terminal=True, record=True)
    naps = []

    def sleep(duration: float) -> None:
        naps.append(duration)
        if len(naps) == 3:
            raise KeyboardInterrupt

    with console.capture() as captured:
        show_live(busy[1], 1.5, console, sleep)
    assert naps == [1.5] * 3
    assert "rows computed/s" in captured.get()


def test_a_live_view_needs_a_terminal(busy: tuple[FakeMetrics, str]) -> None:
    result = run(busy[1])
    assert result.exit_code == 2
    assert "--once" in result.output


def test_a_counter_that_is_gone_is_no_rate() -> None:
    """Such counters belong to engines that a server no longer has."""
    metrics = FakeMetrics()
    span = after_work(metrics)
    series = {k: v for k, v in span.after.series.items() if "prompt_tokens" not in k}
    without = replace(span, after=Scrape(span.after.taken, series))
    assert server_figures(without)["total"]["prompt_tokens_per_s"] is None
    assert not math.isnan(
        server_figures(without)["total"]["generation_tokens_per_s"] or 0
    )
