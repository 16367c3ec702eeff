"""``pyramid-vllm bench`` with a model of Llama-3-8B's shape and no weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_check.loading import ROOT, Skip, need, need_gpu
from gpu_check.pieces import MEASURED, Check, Options

if TYPE_CHECKING:
    from pyramid_vllm.tools.bench.settings import BenchSettings

_FIGURES = ("total_tokens_per_s", "max_num_running", "kv_bytes_per_request")


@dataclass(frozen=True)
class Shape:
    """A model and its benchmark."""

    name: str
    changes: dict[str, Any]
    """Changes to Llama-3-8B's configuration."""
    least_gib: float
    """GPU memory below which it is not tried."""
    dtype: str = "bfloat16"
    num_prompts: int = 24
    prompt_tokens: int = 4096
    output_tokens: int = 128
    kv_memory: tuple[str, str] = ("6x", "26x")
    """Memory that binds and memory that does not, in stock sequences."""
    repeats: int = 3

    def write_config(self, folder: Path) -> None:
        """Write the model's configuration as transformers reads it."""
        file = ROOT / "configs" / "shapes" / "Llama-3-8B" / "config.json"
        content = json.loads(file.read_text(encoding="utf-8")) | self.changes
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


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
    """Run stock vLLM and the policy in turns, where memory binds and where it does
    not."""
    need("torch", "vllm", "transformers")
    shape = TINY if options.on_cpu else _shape_that_fits()
    if shape is SMALL:
        why = f"less than {LARGE.least_gib} GiB: {SMALL.name} in place of {LARGE.name}"
        yield Check("smaller model", MEASURED, why)
    from pyramid_vllm.tools.bench.run import run_bench

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape.write_config(folder)
        run_bench(settings(shape, folder, options))
        text = (folder / "results.json").read_text(encoding="utf-8")
    results = json.loads(text)
    for point in results["points"]:
        yield _check(shape, point, results)


def _shape_that_fits() -> Shape:
    need_gpu()
    import torch

    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    for shape in (LARGE, SMALL):
        # Cards hold somewhat less than they are named for.
        if gib >= 0.95 * shape.least_gib:
            return shape
    raise Skip(f"{gib:.0f} GiB of GPU memory: needs {SMALL.least_gib}")


def settings(shape: Shape, folder: Path, options: Options) -> BenchSettings:
    """The benchmark of a model; its configuration and the results lie in one folder."""
    from pyramid_vllm.tools.bench.settings import BenchSettings

    longest = shape.prompt_tokens + shape.output_tokens
    return BenchSettings(
        model=str(folder),
        num_prompts=shape.num_prompts,
        prompt_tokens=str(shape.prompt_tokens),
        output_tokens=str(shape.output_tokens),
        kv_memory=shape.kv_memory,
        repeats=1 if options.quick else shape.repeats,
        seed=options.seed,
        dtype=shape.dtype,
        max_num_batched_tokens=max(2048, longest),
        engine_args={"load_format": "dummy"},
        out=folder,
    )


def _check(shape: Shape, point: dict[str, Any], results: dict[str, Any]) -> Check:
    """The figures for one amount of memory."""
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
