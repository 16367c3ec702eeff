"""What the documents say of policies, files and tests agrees with the code."""

import json
import re
import statistics

import pytest

from pyramid_vllm.policy import (
    NONE,
    SCORERS,
    LengthRule,
    PolicyConfig,
    Queries,
    fitted,
    preset_names,
    resolve_policy,
    tier_layout,
)
from pyramid_vllm.policy.budgets import BUDGETS
from pyramid_vllm.policy.config import ALIASES
from tests.documents import ROOT, code_words, functions, read, rows
from tests.test_import_directions import FORBIDDEN

POLICIES = read("docs/policies.md")
NAMES = [name for name in preset_names() if name != NONE]


def preset(name: str) -> PolicyConfig:
    policy = resolve_policy(name)
    assert policy is not None
    return policy


def test_every_preset_and_setting_is_explained() -> None:
    words = set(code_words(POLICIES))
    settings = {*PolicyConfig.model_fields, *ALIASES}
    assert {*preset_names(), *settings, *BUDGETS, *SCORERS} <= words
    assert set(rows(POLICIES, "| setting | default |")) == {*PolicyConfig.model_fields}
    explained = rows(POLICIES, "| preset | source |")
    assert {word for row in explained for word in row.split("`, `")} == {
        *preset_names()
    }


def test_presets_have_what_their_table_says() -> None:
    table = rows(POLICIES, "| preset | budget |")
    assert set(table) == set(NAMES)
    for name in NAMES:
        policy = preset(name)
        assert [cell.strip("`") for cell in table[name]] == [
            policy.budget,
            str(policy.retention),
            str(policy.tiers),
            policy.scorer,
            policy.selection,
            policy.evict,
        ]


def test_presets_keep_what_their_table_says() -> None:
    table = rows(POLICIES, "| preset | mean over layers |")
    assert set(table) == set(NAMES)
    for name in NAMES:
        policy = fitted(preset(name), weights=None)
        rule = LengthRule(policy, tier_layout(policy, 32))
        counts = rule.cache_lengths(2048)
        reads_all = policy.scored_queries is Queries.ALL
        queries = 2048 if reads_all else rule.num_queries(2048)
        assert table[name] == [
            f"{rule.layout.mean(counts) / 2048:.1%}",
            str(counts[0]),
            str(counts[-1]),
            str(queries),
        ], name


@pytest.mark.parametrize("setting", PolicyConfig.model_fields)
def test_settings_have_the_defaults_of_their_table(setting: str) -> None:
    default, in_pyramid, _ = rows(POLICIES, "| setting | default |")[setting]
    field = PolicyConfig.model_fields[setting]
    assert default == ("" if field.is_required() else _shown(field.default))
    assert in_pyramid == _shown(getattr(preset("pyramid"), setting))


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def test_the_readme_has_the_figures_of_the_results() -> None:
    """The README also calls a goal missed where it is missed."""
    results = json.loads(read("docs/results.json"))
    values = [goal["value"] for goal in results["goals"]]
    loss, needles, second_loss, second_needles, *_, memory, first, bound, free = values
    best = min(peer["share"]["value"] for peer in results["peers"].values())
    found = max(statistics.mean(p["scores"]) for p in results["peers"].values())
    table = rows(read("README.md"), "| `pyramid` against the full cache")
    shown = [cells[1:3] for cells in table.values()]
    assert [first_cell.partition(" (")[0] for first_cell, _ in shown[:7]] == [
        f"{memory:.0%}",
        f"{loss:+.2%}",
        f"{needles:.0%}",
        f"{best:+.2%}; {found:.0%}",
        f"{bound:.2f}",
        f"{free:.2f}",
        f"{first:.2f}",
    ]
    assert shown[1][1] == f"{second_loss:+.2%}"
    assert shown[2][1].startswith(f"{second_needles:.0%} ")
    missed = [row for row, cells in table.items() if "missed" in cells[-1]]
    assert len(missed) == sum(not goal["met"] for goal in results["goals"])
    assert missed == [list(table)[4], list(table)[6]]


#: Folders that paths in documents begin with; else they are the package's.
TOPS = ("tests/", "scripts/", "configs/", "docs/", "patches/", "pyramid_vllm/")


@pytest.mark.parametrize("document", ["architecture", "contributing", "policies"])
def test_files_functions_and_tests_that_are_named_exist(document: str) -> None:
    text = read(f"docs/{document}.md")
    words = [word.split()[0] for word in code_words(text)]
    named = [word for word in words if re.fullmatch(r"\w[\w./-]+(::[\w.]+)?", word)]
    paths = [word for word in named if "/" in word or "::" in word]
    assert len(paths) > 3
    for word in paths:
        file, _, name = word.partition("::")
        path = file if file.startswith(TOPS) else f"pyramid_vllm/{file}"
        assert (ROOT / path).exists(), word
        assert not name or name in functions(path), word


def test_every_part_that_may_not_import_is_named() -> None:
    table = rows(read("docs/contributing.md"), "| part | knows |")
    parts = {part.removeprefix("pyramid_vllm/").rstrip("/") for part in table}
    assert parts == set(FORBIDDEN)
