"""``pyramid-vllm bench`` with a model of Llama-3-8B's shape and no weights."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.loading import ROOT, Skip, has_gpu, need
from gpu_check.pieces import MEASURED, Check, Options

_TIMEOUT = 5 * 3600
_TAIL_CHARS = 4000
_FIGURES = ("total_tokens_per_s", "max_num_running", "kv_bytes_per_request")


@dataclass(frozen=True)
class Shape:
    """A model, and what is asked of it."""

    name: str
    changes: dict[str, Any]
    """Of Llama-3-8B's configuration."""
    least_gib: float
    """GPU memory below which it is not tried."""
    dtype: str = "bfloat16"
    num_prompts: int = 24
    prompt_tokens: int = 4096
    output_tokens: int = 128
    kv_memory: tuple[str, str] = ("6x", "26x")
    """What binds, and what does not; in stock sequences."""
    repeats: int = 3

    @property
    def config(self) -> dict[str, Any]:
        """Of the model, as transformers reads it."""
        file = ROOT / "configs" / "shapes" / "Llama-3-8B" / "config.json"
        base: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return base | self.changes


LARGE = Shape("Llama-3-8B-shaped", {}, 40)
_SMALL = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SMALL = Shape("Llama-3.2-1B-shaped", _SMALL, 10)
_TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
TINY = Shape("tiny", _TINY, 0, "float32", 4, 256, 8, ("2x", "6x"), 1)


def run(options: Options) -> Iterator[Check]:
    """Stock vLLM and the policy in turns, where memory binds and where not."""
    need("torch", "vllm", "transformers", "matplotlib")
    shape = TINY if options.on_cpu else _shape_that_fits()
    if shape is SMALL:
        why = f"less than {LARGE.least_gib} GiB: {SMALL.name} in place of {LARGE.name}"
        yield Check("smaller model", MEASURED, why)
    results = _results(shape, options)
    for point in results["points"]:
        yield _check(shape, point, results)


def _shape_that_fits() -> Shape:
    if not has_gpu():
        raise Skip("no NVIDIA GPU that torch can use")
    import torch

    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    for shape in (LARGE, SMALL):
        # Cards hold somewhat less than they are named for.
        if gib >= 0.95 * shape.least_gib:
            return shape
    raise Skip(f"{gib:.0f} GiB of GPU memory: needs {SMALL.least_gib}")


def arguments(shape: Shape, folder: Path, options: Options) -> list[str]:
    """Of ``pyramid-vllm bench``."""
    longest = shape.prompt_tokens + shape.output_tokens
    found = {
        "--model": folder / "model",
        "--workload": "offline",
        "--num-prompts": shape.num_prompts,
        "--prompt-tokens": shape.prompt_tokens,
        "--output-tokens": shape.output_tokens,
        "--repeats": 1 if options.quick else shape.repeats,
        "--seed": options.seed,
        "--dtype": shape.dtype,
        "--max-num-batched-tokens": max(2048, longest),
        "--engine-args": json.dumps({"load_format": "dummy"}),
        "--out": folder / "results",
    }
    texts = [str(part) for pair in found.items() for part in pair]
    return [*texts, *(x for memory in shape.kv_memory for x in ("--kv-memory", memory))]


def _results(shape: Shape, options: Options) -> dict[str, Any]:
    """What the command wrote.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        text = json.dumps(shape.config, indent=2)
        (folder / "model" / "config.json").write_text(text, encoding="utf-8")
        code = "from pyramid_vllm.tools.cli import app; app()"
        command = [sys.executable, "-c", code, "bench"]
        done = subprocess.run(
            [*command, *arguments(shape, folder, options)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        if done.returncode:
            tail = (done.stdout + done.stderr)[-_TAIL_CHARS:]
            how = f"ended with {done.returncode}"
            raise RuntimeError(f"pyramid-vllm bench {how}:\n{tail}")
        file = folder / "results" / "results.json"
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def _check(shape: Shape, point: dict[str, Any], results: dict[str, Any]) -> Check:
    """One amount of memory."""
    sides = point["sides"]
    (policy,) = [name for name in sides if name != "none"]
    parts = []
    for key in _FIGURES:
        if ratio := sides[policy][key]["ratio"]:
            low, high = ratio["min"], ratio["max"]
            parts.append(f"{key} {ratio['median']:.2f} ({low:.2f}-{high:.2f})")
    rate = sides["none"]["total_tokens_per_s"]["median"]
    binds = "memory binds" if point["memory_binds"] else "memory does not bind"
    detail = (
        f"{binds}; {policy} to stock: {', '.join(parts)}; stock {rate:.0f} tokens/s"
    )
    figures = {"point": point, "settings": results["settings"]}
    figures |= {"model": shape.name, "runs": results["runs"]}
    return Check(f"{shape.name}, {point['label']}", MEASURED, detail, figures)
