"""`scripts/bench-scheduler`: what it writes, and what it says of bad options."""

import json
from pathlib import Path
from typing import Any

import bench_scheduler
import pytest
import typer
from typer.testing import CliRunner

app = typer.Typer()
app.command()(bench_scheduler.main)


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_row_for_each_case_with_the_ratio_of_its_sides(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    matrix = ("--running", "8", "--tiers", "1", "--tiers", "2", "--caching", "on")
    result = bench(*matrix, "--rounds", "1", "--json", str(file))
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text(encoding="utf-8"))
    assert {"argv", "date", "versions", "seed", "machine"} <= content.keys()
    rows = content["rows"]
    assert [(row["load"], row["tiers"]) for row in rows] == [
        ("decode", 1),
        ("decode", 2),
        ("prefill", 1),
        ("prefill", 2),
    ]
    for row in rows:
        assert row.keys() == {
            *("running", "tiers", "caching", "load"),
            *("stock_ms", "ours_ms", "ratio"),
        }
        assert (row["running"], row["caching"]) == (8, True)
        assert row["stock_ms"] > 0
        assert row["ours_ms"] > 0
        assert row["ratio"] == row["ours_ms"] / row["stock_ms"]


def test_without_a_prefix_cache_nothing_is_hashed() -> None:
    case = bench_scheduler.Case(running=8, tiers=2, caching=False, load="decode")
    side = bench_scheduler.Side(case, None, num_rounds=1)
    assert side.round() > 0
    assert not any(r.block_hashes for r in side.scheduler.requests.values())


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        ("--running", "9", "multiples of 8"),
        ("--running", "0", "multiples of 8"),
        ("--tiers", "33", "1 to 32"),
        ("--load", "idle", "'prefill'"),
        ("--caching", "yes", "'on', 'off'"),
        ("--rounds", "0", "1 or more"),
    ],
)
def test_a_bad_option_is_named_with_what_is_valid(
    option: str, value: str, valid: str
) -> None:
    result = bench(option, value)
    assert result.exit_code == 2
    for part in (option, value, valid):
        assert part in result.output
