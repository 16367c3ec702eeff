"""What ``inspect`` shows of a request: as numbers and on the page."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pyramid_vllm.policy import KVPolicyError, LengthRule, PolicyConfig, TierLayout
from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.inspection import run
from pyramid_vllm.tools.inspection.engine import inspect_request, run_engine
from pyramid_vllm.tools.inspection.page import page
from pyramid_vllm.tools.inspection.settings import InspectSettings
from pyramid_vllm.tools.inspection.view import Inspection, inspection_of
from pyramid_vllm.tools.provenance import provenance
from tests.models import TINY_LLAMA, save_tiny_llama
from tests.one_engine import save_tokenizer

NASTY = "</script><b>&amp;<!--"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# Small data.


def small(texts: dict[int, str] | None = None) -> Inspection:
    """Ten tokens of prompt and three generated, in two layers of two KV heads."""
    policy = PolicyConfig(
        name="small", retention=0.6, steepness=0, recent=2, sinks=1, min_context=0
    )
    held = [
        [[0, 1, 3, 5, 8, 9, 10, 11], [0, 2, 3, 5, 8, 9, 10, 11]],
        [[0, 4, 5, 6, 8, 9, 10, 11], [0, 4, 5, 6, 8, 9, 10, 11]],
    ]
    texts = {i: f" t{i}" for i in range(13)} | (texts or {})
    request = {
        "model": "some/<model>",
        "tokens": [{"id": 40 + i, "text": text} for i, text in texts.items()],
        "num_prompt": 10,
        "num_kv_heads": 2,
        "block_size": 4,
        "layer_page_bytes": 1024,
    }
    return inspection_of(request, LengthRule(policy, TierLayout(2, 2)), held)


def report_of(inspection: Inspection) -> dict[str, Any]:
    return inspection | provenance(0) | {"argv": ["inspect"]}


def kv_bytes(inspection: Inspection) -> int:
    return sum(tier["kv_bytes"] for tier in inspection["tiers"])


def test_counts_heads_and_pages() -> None:
    found = small()
    first, second = found["layers"]
    assert first["positions"] == [0, 1, 2, 3, 5, 8, 9, 10, 11]
    assert first["heads"] == [2, 1, 1, 2, 2, 2, 2, 2, 2]
    assert set(second["heads"]) == {2}
    assert [tier["num_held"] for tier in found["tiers"]] == [8, 8]
    assert [tier["num_prompt_held"] for tier in found["tiers"]] == [6, 6]
    assert [tier["pages"] for tier in found["tiers"]] == [2, 2]
    assert [tier["kv_bytes"] for tier in found["tiers"]] == [2048, 2048]
    assert found["stock_kv_bytes"] == 2 * 3 * 1024
    assert (found["num_computed"], found["sinks"], found["recent"]) == (12, 1, 2)


def test_other_counts_than_the_policy_says_are_no_picture() -> None:
    found = small()
    rule = LengthRule(PolicyConfig(**found["policy"]), TierLayout(2, 2))
    with pytest.raises(RuntimeError, match=r"layer 0 holds \[7, 8\] tokens"):
        inspection_of(found, rule, [[[*range(7)], [*range(8)]]] * 2)


def test_the_table_says_what_the_json_says() -> None:
    console = Console(width=120, record=True, file=StringIO())
    run.print_table(small(), console)
    text = console.export_text()
    cells = [re.split(r"\s*│\s*", line.strip("│ ")) for line in text.splitlines()]
    assert ["0", "0", "6", "60.0%", "8", "2", "2.0 KiB"] in cells
    assert ["1", "1", "6", "60.0%", "8", "2", "2.0 KiB"] in cells
    assert "66.7% of stock vLLM's 6.0 KiB" in text


class Pieces:
    """A tokenizer that drops the space of a first word."""

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return ("\u2581the", "the", "<0x0A>")[token_id]

    def decode(self, ids: list[int], **_: Any) -> str:
        return ("the", "the", "\n")[ids[0]]


def test_tokens_keep_their_spaces() -> None:
    texts = [run.token_text(Pieces(), token_id) for token_id in range(3)]
    assert texts == [" the", "the", "\n"]


# Options.


def test_one_prompt_is_given(tmp_path: Path) -> None:
    file, empty = tmp_path / "prompt.txt", tmp_path / "empty.txt"
    file.write_text("from a file")
    empty.write_text("")
    assert InspectSettings("m", prompt_file=file).prompt_text == "from a file"
    assert InspectSettings("m", prompt="text").prompt_text == "text"
    for given, message in (
        ({}, "none given"),
        ({"prompt": "text", "prompt_file": file}, "both given"),
        ({"prompt": ""}, "empty"),
        ({"prompt_file": empty}, "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            assert InspectSettings("m", **given).prompt_text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: valid is 1"),
        ({"kv_policy": "x"}, "kv_policy='x': valid is --kv-policy"),
        ({"speculative_config": {}}, "drafts are not recorded"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
    ],
)
def test_what_is_not_recorded_is_refused(argument: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of("m", {}, engine_args=argument)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x", "--kv-policy", "nosuch"], "nosuch"),
        ([], "prompt, prompt_file: none given"),
        (["--prompt", "x", "--chat"], "no chat template"),
        (["--prompt", "a b" * 3000], "valid is up to 4096 together"),
        (["--prompt", "x", "--engine-args", '{"dtype": "auto"}'], "dtype is 'auto'"),
    ],
)
def test_errors_come_before_the_engine(
    options: list[str], message: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_engine", lambda **task: pytest.fail("it ran"))
    result = CliRunner().invoke(app, ["inspect", model, *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


# Engines.

POLICY = {
    "name": "test",
    "base": "pyramid-by-depth",
    "retention": 0.4,
    "recent": 24,
    "min_context": 40,
    "tiers": 3,
    "steepness": 0.6,
}
POLICIES: dict[str, dict[str, Any]] = {
    "head": {"selection": "head"},
    "layer": {},
    "pruned": {"prune_from": 2},
    "groups": {"exceed_length_to_compress": 4, "gen_queries": 4, "recent": 8},
    "all": {"retention": 1.0, "steepness": 0},
    "none": {},
}
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder, TINY_LLAMA)
    save_tokenizer(folder, TINY_LLAMA["vocab_size"])
    return str(folder)


def prompt() -> str:
    random = Random(0)
    words = ["".join(random.choices("etaoinshrdlu", k=5)) for _ in range(60)]
    return f"{NASTY} {' '.join(words)}"


def settings_of(model: str, changes: dict[str, Any], **others: Any) -> InspectSettings:
    return InspectSettings(
        model=model,
        kv_policy=json.dumps(POLICY | changes),
        kv_policy_config=None,
        prompt=prompt(),
        chat=False,
        max_tokens=MAX_TOKENS,
        **others,
    )


@pytest.fixture(scope="module")
def found(model: str) -> dict[str, Inspection]:
    """Results by the policy's name. Engines run in this process, one after the
    other."""
    results = {}
    for name, changes in POLICIES.items():
        settings = settings_of(model, changes)
        if name == "none":
            settings = replace(settings, kv_policy="none")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "run_engine", inspect_request)
            results[name] = run.inspect_prompt(settings)
    return results


def kept(inspection: Inspection, layer: int) -> set[int]:
    return set(inspection["layers"][layer]["positions"])


@pytest.mark.parametrize("name", POLICIES)
def test_every_head_keeps_what_is_always_kept(
    name: str, found: dict[str, Inspection]
) -> None:
    this = found[name]
    assert this["num_prompt"] > 150
    assert "".join(token["text"] for token in this["tokens"]).startswith(prompt())
    always = {*range(this["sinks"])}
    always |= {*range(this["num_prompt"] - this["recent"], this["num_prompt"])}
    newest = this["num_computed"] - 1
    for layer in this["layers"]:
        heads = dict(zip(layer["positions"], layer["heads"], strict=True))
        assert {heads[position] for position in (*always, newest)} == {2}


def test_what_is_evicted_at_the_prompts_end(found: dict[str, Inspection]) -> None:
    for name in ("head", "layer"):
        counts = [tier["num_prompt_held"] for tier in found[name]["tiers"]]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] < 0.4 * found[name]["num_prompt"]
        assert kv_bytes(found[name]) < found[name]["stock_kv_bytes"]
        generated = set(range(found[name]["num_prompt"], found[name]["num_computed"]))
        assert all(generated < kept(found[name], layer) for layer in range(6))
    assert {1, 2} == {h for layer in found["head"]["layers"] for h in layer["heads"]}
    assert {2} == {h for layer in found["layer"]["layers"] for h in layer["heads"]}


def test_a_pruned_row_is_in_no_deeper_layer(found: dict[str, Inspection]) -> None:
    this = found["pruned"]
    # A pruned tier has the rows that it got, and no other.
    assert kept(this, 2) == kept(this, 3)
    assert kept(this, 4) == kept(this, 5)
    assert kept(this, 4) < kept(this, 3) < set(range(this["num_computed"]))
    other = found["layer"]
    assert kept(other, 4) != kept(other, 5), "each layer chooses for itself"


def test_groups_of_generated_tokens_are_compressed(
    found: dict[str, Inspection],
) -> None:
    this = found["groups"]
    generated = range(this["num_prompt"], this["num_computed"])
    gone = [set(generated) - kept(this, layer) for layer in range(6)]
    assert len(gone[0]) < len(gone[-1])
    assert all(gone[layer] for layer in (4, 5))


@pytest.mark.parametrize("name", ["all", "none"])
def test_everything_is_kept(name: str, found: dict[str, Inspection]) -> None:
    this = found[name]
    for layer in this["layers"]:
        assert layer["positions"] == [*range(this["num_computed"])]
        assert set(layer["heads"]) == {2}
    assert kv_bytes(this) == this["stock_kv_bytes"]
    assert this["tokens"] == found["none"]["tokens"]


@pytest.mark.timeout(300)
def test_a_process_of_its_own_finds_the_same(
    command: Path, found: dict[str, Inspection]
) -> None:
    written = json.loads((command / "inspect.json").read_text())
    assert written == found["head"] | {
        key: written[key] for key in ("argv", "date", "versions", "seed", "machine")
    }


@pytest.fixture(scope="module")
def command(
    model: str, tmp_path_factory: pytest.TempPathFactory, found: dict[str, Inspection]
) -> Path:
    """The files that the command wrote."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "prompt.txt").write_text(prompt())
    policy = json.dumps(POLICY | POLICIES["head"])
    options = ["--prompt-file", str(folder / "prompt.txt"), "--out", str(folder)]
    options += ["--kv-policy", policy, "--max-tokens", str(MAX_TOKENS), "--json"]
    result = CliRunner().invoke(app, ["inspect", model, *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(
        (folder / "inspect.json").read_text()
    ) | {key: json.loads(result.stdout)[key] for key in ("date",)}
    return folder


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("print('out of luck'); sys.exit(3)", RuntimeError, "out of luck"),
        ("print('gone')", RuntimeError, "the engine failed"),
        (
            "print('@pyramid-vllm', json.dumps({'error': 'refused'}))",
            KVPolicyError,
            "refused",
        ),
    ],
)
def test_an_engine_that_fails_says_why(
    body: str,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = tmp_path / "child"
    child.write_text(
        f"#!{sys.executable}\nimport json, sys\ntask = json.load(sys.stdin)\n{body}\n"
    )
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    with pytest.raises(error, match=message):
        run_engine(model="m")


# The page.


def dom_of(file: Path, folder: Path) -> str:
    """What a browser makes of a page."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=2000"]
    result = subprocess.run(
        [*command, file.as_uri()], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def text_of(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


def rows_of(dom: str) -> list[list[str]]:
    rows = re.findall(r"<tr data-tier=.*?</tr>", dom, flags=re.DOTALL)
    return [
        [text_of(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
        for row in rows
    ]


def expected_rows(report: dict[str, Any]) -> list[list[str]]:
    from pyramid_vllm.policy.tiers import runs
    from pyramid_vllm.tools.sizes import format_bytes

    return [
        [
            f"Tier {tier['tier']}",
            runs(tuple(tier["layers"])),
            f"{tier['num_prompt_held']:,}",
            f"{tier['num_prompt_held'] / report['num_prompt']:.1%}",
            f"{tier['num_held']:,}",
            f"{tier['pages']:,}",
            format_bytes(tier["kv_bytes"]),
        ]
        for tier in report["tiers"]
    ]


def shown_text(dom: str) -> str:
    """The text in the part of the page that shows the prompt and the output."""
    (part,) = re.findall(r'<div id="text".*?</div>', dom, flags=re.DOTALL)
    assert "<b" not in part
    return text_of(part)


def test_the_page_needs_nothing_else() -> None:
    report = report_of(small({3: NASTY}))
    html = page(report)
    assert not re.search(r"(?:src|href)=[\"'](?!#)|url\(|@import|https?:", html)
    assert html.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*)</script>', html)
    assert data is not None
    assert json.loads(data[1]) == json.loads(json.dumps(report))


def test_the_page_has_tiers_and_text_without_a_script() -> None:
    """The page also shows what looks like a tag as text."""
    report = json.loads(json.dumps(report_of(small({3: NASTY}))))
    html = page(report)
    assert rows_of(html) == expected_rows(report)
    assert shown_text(html) == "".join(token["text"] for token in report["tokens"])
    notes = [
        unescape(note)
        for note in re.findall(r'data-position="\d+" title="(.*?)"', html)
    ]
    assert len(notes) == 13
    assert notes[0] == ("Position 0 (id 40, sink, always kept): kept in 2 of 2 layers")
    assert notes[1] == "Position 1 (id 41, prompt): kept in 1 of 2 layers"
    assert notes[7] == "Position 7 (id 47, prompt): kept in 0 of 2 layers"
    assert "generated last, not in the cache yet" in notes[12]


@needs_chromium
@pytest.mark.timeout(300)
def test_the_page_shows_what_the_json_says(command: Path, tmp_path: Path) -> None:
    report = json.loads((command / "inspect.json").read_text())
    dom = dom_of(command / "inspect.html", tmp_path)
    assert rows_of(dom) == expected_rows(report)
    assert shown_text(dom) == "".join(token["text"] for token in report["tokens"])
    assert shown_text(dom).startswith(prompt())


@needs_chromium
@pytest.mark.timeout(120)
def test_the_page_is_used_by_keyboard(tmp_path: Path) -> None:
    """The page also shows what looks like a tag as text."""
    found = small({1: NASTY})
    keys = "['ArrowRight', 'ArrowDown', 'ArrowUp']"
    script = (
        f"for (const key of {keys}) byId('grid').dispatchEvent("
        "new KeyboardEvent('keydown', {key}));"
        "document.querySelectorAll('#tiers button')[1].click();"
    )
    html = page(report_of(found))
    html = html.replace("</body>", f"<script>{script}</script></body>")
    file = tmp_path / "inspect.html"
    file.write_text(html)
    dom = dom_of(file, tmp_path / "profile")
    assert shown_text(dom) == "".join(token["text"] for token in found["tokens"])
    cell = text_of(re.findall(r'<div id="cell".*?</div>', dom, flags=re.DOTALL)[0])
    assert f"Token: {NASTY}\nPosition 1 (id 41, prompt): kept in 1 of 2" in cell
    assert "Layer 0, tier 0: kept by 1 of 2 KV heads." in cell
    pressed = re.findall(r'<button[^>]*aria-pressed="(\w+)"', dom)
    assert pressed == ["false", "true"]
    # Of tier 1, in which no head keeps position 1.
    grey = re.findall(r'<span data-position="(\d+)"[^>]*class="[^"]*gone', dom)
    assert grey == [str(p) for p in range(13) if p not in kept(found, 1)]
