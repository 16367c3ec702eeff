"""`scripts/bench-v2-step`: what it writes, and what it says of bad options."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/bench_v2_step.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the V2 runner is chosen when vLLM is imported."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_row_for_each_case_with_the_ratio_of_its_sides(tmp_path: Path) -> None:
    """The script itself checks that both sides are what a row says."""
    file = tmp_path / "rows.json"
    cases = ("--running", "8", "--tiers", "1", "--tiers", "3")
    result = bench(*cases, "--rounds", "1", "--json", str(file))
    assert result.returncode == 0, result.stderr
    content = json.loads(file.read_text(encoding="utf-8"))
    assert {"argv", "date", "versions", "seed", "machine"} <= content.keys()
    rows = content["rows"]
    assert [(row["running"], row["tiers"]) for row in rows] == [(8, 1), (8, 3)]
    for row in rows:
        assert row.keys() == {"running", "tiers", "stock_ms", "ours_ms", "ratio"}
        assert row["stock_ms"] > 0
        assert row["ours_ms"] > 0
        assert row["ratio"] == row["ours_ms"] / row["stock_ms"]


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        ("--running", "0", "1 or more"),
        ("--tiers", "7", "1 to 6"),
        ("--rounds", "0", "1 or more"),
    ],
)
def test_a_bad_option_is_named_with_what_is_valid(
    option: str, value: str, valid: str
) -> None:
    result = bench(option, value)
    assert result.returncode == 2
    for part in (option, value, valid):
        assert part in result.stdout + result.stderr
