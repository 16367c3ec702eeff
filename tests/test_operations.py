"""docs/operations.md lists what exists."""

import re

import yaml

from pyramid_vllm.metrics.prometheus import COUNTERS, GAUGES, PREFIX
from tests.documents import ROOT, read, rows

TEXT = read("docs/operations.md")


def test_the_table_of_metrics_is_whole() -> None:
    table = rows(TEXT, "| metric | kind |")
    kinds = dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(GAUGES, "gauge")
    kinds |= {"info": "gauge", "compaction_time_seconds": "histogram"}
    assert {name: cells[0] for name, cells in table.items()} == {
        PREFIX + name: kind for name, kind in kinds.items()
    }
    for name, (_, labels) in COUNTERS.items():
        assert table[PREFIX + name][1] == ", ".join(f"`{label}`" for label in labels)


def test_the_table_of_alerts_is_whole() -> None:
    path = ROOT / "configs/prometheus/alerts.yaml"
    (group,) = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    assert set(rows(TEXT, "| alert | threshold |")) == {
        r["alert"] for r in group["rules"]
    }


def test_links_lead_somewhere() -> None:
    """Links of every document are checked, except those to the web."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("scripts/*/*.md")]
    assert len(documents) > 8
    for document in documents:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                assert (document.parent / target).exists(), (document.name, target)
