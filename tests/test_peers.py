"""The scripts that run other projects' methods on our prompts."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "scripts" / "peers"
PROMPT = [(31 * i * i + 7 * i) % 500 + 5 for i in range(200)]
TARGET = [(17 * i + 3) % 500 for i in range(12)]
ALL = list(range(len(PROMPT)))
#: What StreamingLLM keeps of the prompt, at a share of a quarter.
KEPT = [*range(4), *range(154, 200)]


@pytest.fixture(scope="module")
def peer() -> Iterator[Any]:
    """The script as a module."""
    sys.path.insert(0, str(PEERS))
    try:
        import kvpress_eval

        yield kvpress_eval
    finally:
        sys.path.remove(str(PEERS))


@pytest.fixture
def content(tiny_llama: str) -> dict[str, Any]:
    """A valid input."""
    return {
        "model": tiny_llama,
        "presses": {"streaming_llm": 0.25, "snapkv": 0.5, "pyramidkv": 0.5},
        "windows": [{"prompt": PROMPT, "target": TARGET}],
        "samples": [{"prompt": PROMPT[:100], "max_tokens": 5}],
        "seed": 0,
    }


@pytest.fixture(scope="module")
def peers_python() -> str:
    """The environment that `scripts/peers/setup` makes."""
    venv = Path(os.environ.get("PYRAMID_PEERS_VENV", ".venv-peers"))
    python = ROOT / venv / "bin" / "python"  # an absolute path stays what it is
    if not (ROOT / venv / ".pyramid-peers").exists():
        pytest.skip(f"kvpress is not installed in {venv}: run scripts/peers/setup")
    return str(python)


@dataclass(frozen=True)
class Keep:
    """A press by hand: after the prefill, only these tokens of the prompt are left."""

    kept: list[int]

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        hooks = [
            layer.self_attn.register_forward_hook(self._evict, with_kwargs=True)
            for layer in model.model.layers
        ]
        yield
        for hook in hooks:
            hook.remove()

    def _evict(self, module: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        layer.keys = layer.keys[:, :, self.kept]
        layer.values = layer.values[:, :, self.kept]


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def one_pass_nll(folder: str, kept: list[int]) -> list[float]:
    """The target's loss, from one pass in which its rows see only ``kept``."""
    ids = torch.tensor([PROMPT + TARGET])
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    hidden = sorted(set(range(len(PROMPT))) - set(kept))
    seen[len(PROMPT) :, hidden] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = load(folder)(input_ids=ids, attention_mask=mask[None, None]).logits[0]
    rows = logits[len(PROMPT) - 1 : -1].log_softmax(-1)
    return [-float(row[token]) for row, token in zip(rows, TARGET, strict=True)]


@pytest.mark.parametrize(
    ("press", "kept"),
    [(None, ALL), (Keep(KEPT), KEPT)],
    ids=["full", "evicting"],
)
@torch.no_grad()
def test_loss_is_that_of_one_pass_without_the_evicted(
    peer: Any, tiny_llama: str, press: Keep | None, kept: list[int]
) -> None:
    """So later tokens have the positions that they have in the uncompressed text."""
    runner = peer.Runner(load(tiny_llama), press)
    nll, top1, held = runner.score(peer.Window(PROMPT, TARGET))
    assert held == len(kept)
    assert nll == pytest.approx(one_pass_nll(tiny_llama, kept), abs=1e-3)
    assert len(top1) == len(TARGET)


def test_the_oracle_tells_the_presses_apart(tiny_llama: str) -> None:
    full = one_pass_nll(tiny_llama, ALL)
    assert full != pytest.approx(one_pass_nll(tiny_llama, KEPT), abs=0.1)


@torch.no_grad()
def test_a_press_that_evicts_nothing_is_an_error(peer: Any, tiny_llama: str) -> None:
    runner = peer.Runner(load(tiny_llama), Keep(ALL))
    with pytest.raises(RuntimeError, match="holds all 200 tokens"):
        runner.score(peer.Window(PROMPT, TARGET))


@torch.no_grad()
def test_answers_are_greedy_and_end_where_the_model_says(
    peer: Any, tiny_llama: str
) -> None:
    model = load(tiny_llama)
    tokens, _ = peer.Runner(model, None).answer(peer.Sample(PROMPT, 8))
    ids = torch.tensor([PROMPT + tokens[:-1]])
    logits = model(input_ids=ids).logits[0, len(PROMPT) - 1 :]
    assert tokens == logits.argmax(-1).tolist()
    model.generation_config.eos_token_id = [tokens[3]]
    ended, _ = peer.Runner(model, None).answer(peer.Sample(PROMPT, 8))
    assert ended == tokens[: tokens.index(tokens[3]) + 1]


def changed(content: dict[str, Any], path: str, value: Any) -> str:
    """The input with one value replaced, or removed if it is None."""
    *parents, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    copy = json.loads(json.dumps(content))
    owner = copy
    for key in parents:
        owner = owner[key]
    owner[last] = value
    if value is None:
        del owner[last]
    return json.dumps(copy)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model", "/no/such/model", ["valid is the folder of a model", "/no/such"]),
        ("seed", None, ["Field required"]),
        ("colour", 1, ["Unexpected"]),
        ("presses.snap", 0.5, ["'snapkv', 'pyramidkv', 'streaming_llm'"]),
        ("presses.snapkv", 1.0, ["less than 1", "input_value=1.0"]),
        ("windows.0.target", [], ["at least 1 item", "not 0"]),
        ("windows.0.prompt", [1] * 64, ["at least 65 items", "not 64"]),
        ("windows.0.prompt", "text", ["valid array", "'text'"]),
        ("windows.0.target", [1, True], ["valid integer", "True"]),
        ("samples.0.max_tokens", 0, ["greater than 0", "input_value=0"]),
        ("samples.0.prompt", None, ["Field required"]),
    ],
)
def test_what_is_wrong_with_the_input_is_named(
    peer: Any, content: dict[str, Any], path: str, value: Any, words: list[str]
) -> None:
    with pytest.raises(ValueError, match=re.escape(path)) as error:
        peer.read_task(changed(content, path, value))
    for part in words:
        assert part in str(error.value)


def test_a_valid_input_is_taken(peer: Any, content: dict[str, Any]) -> None:
    task = peer.read_task(json.dumps(content))
    assert task.windows[0].target == TARGET
    assert task.samples[0].max_tokens == 5


@pytest.mark.parametrize("file", sorted(PEERS.glob("*.py")), ids=lambda file: file.name)
def test_peers_run_without_us(file: Path) -> None:
    """Their environment has neither this package nor its vLLM."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    own = {other.stem for other in PEERS.glob("*.py")}
    peers = {"torch", "transformers", "kvpress", "pydantic", "annotated_types"}
    assert names <= set(sys.stdlib_module_names) | own | peers


@torch.no_grad()
def test_a_report_is_continued(
    peer: Any,
    content: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Finished parts of a report stay; a report of another input is not used."""
    monkeypatch.setattr(peer, "version", lambda package: f"{package}'s")
    monkeypatch.setattr(peer, "load_model", lambda task: load(task.model))
    monkeypatch.setattr(peer, "make_press", lambda name, share: Keep(KEPT))
    content |= {"presses": {"snapkv": 0.25}, "samples": []}
    task, file = peer.read_task(json.dumps(content)), tmp_path / "output.json"
    peer.run(task, peer.load_report(file, "digest", 0), file)
    first = peer.load_report(file, "digest", 0)
    assert first["presses"]["snapkv"]["settings"] == {"kept": KEPT}
    peer.save(first | {"full": {"nll": "kept"}, "presses": {}}, file)
    peer.run(task, peer.load_report(file, "digest", 0), file)
    second = peer.load_report(file, "digest", 0)
    assert second["full"] == {"nll": "kept"}
    assert second["presses"] == first["presses"]
    assert peer.load_report(file, "another", 0)["full"] is None


def test_kvpress_keeps_what_it_is_told(
    peers_python: str, content: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "input.json").write_text(json.dumps(content), encoding="utf-8")
    command = [peers_python, str(PEERS / "kvpress_eval.py"), "input.json", "out.json"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    presses = report["presses"]
    full = one_pass_nll(content["model"], ALL)
    streaming = one_pass_nll(content["model"], KEPT)
    assert report["full"]["nll"][0] == pytest.approx(full, abs=1e-3)
    assert presses["streaming_llm"]["nll"][0] == pytest.approx(streaming, abs=1e-3)
    held = {name: press["kept_tokens_windows"] for name, press in presses.items()}
    assert held == {"streaming_llm": [50], "snapkv": [100], "pyramidkv": [100]}
    assert presses["snapkv"]["nll"] != presses["pyramidkv"]["nll"]
    assert presses["pyramidkv"]["settings"]["window_size"] == 64
