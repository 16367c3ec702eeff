"""Load the package without its imports: kernels need torch and Triton alone."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
#: Pieces read from this variable whether there is a GPU: importing torch takes seconds.
KNOWN = "GPU_CHECK_HAS_GPU"
_PACKAGE = "pyramid_vllm"


class Skip(Exception):
    """Something cannot run here; the message gives the reason."""


def load_package() -> bool:
    """Make modules of ``pyramid_vllm`` importable where its own imports are missing.

    Returns:
        Whether the package itself can be imported.
    """
    try:
        return hasattr(importlib.import_module(_PACKAGE), "__version__")
    except ImportError:
        for name in [n for n in sys.modules if n.split(".")[0] == _PACKAGE]:
            del sys.modules[name]
        bare = ModuleType(_PACKAGE)
        bare.__path__ = [str(ROOT / _PACKAGE)]
        sys.modules[_PACKAGE] = bare
        return False


def need(*packages: str) -> None:
    """Raises: Skip: a package is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise Skip(f"{name} is not installed")


def has_gpu() -> bool:
    """Whether torch finds an NVIDIA GPU. Pieces get the answer of their parent
    process."""
    if KNOWN in os.environ:
        return os.environ[KNOWN] == "1"
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available() and torch.version.cuda is not None


def need_gpu() -> None:
    """Raises: Skip: there is no GPU."""
    if not has_gpu():
        raise Skip("no NVIDIA GPU that torch can use")


def is_interpreted() -> bool:
    """Whether kernels run interpreted, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
