"""The kernels without the rest of the package: they need torch and Triton alone."""

import importlib
import importlib.util
import os
import sys
from types import ModuleType

from gpu_check.pieces import ROOT, Skip

#: Variable that tells pieces whether there is a GPU: to import torch takes seconds.
KNOWN = "GPU_CHECK_HAS_GPU"
_PACKAGE = "pyramid_vllm"


def load_kernels() -> ModuleType:
    """``pyramid_vllm.kernels``, also where what the package imports is missing.

    Raises:
        Skip: torch or Triton is.
    """
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            raise Skip(f"{name} is not installed")
    try:
        importlib.import_module(_PACKAGE)
    except ImportError:
        for name in [n for n in sys.modules if n.split(".")[0] == _PACKAGE]:
            del sys.modules[name]
        bare = ModuleType(_PACKAGE)
        bare.__path__ = [str(ROOT / _PACKAGE)]
        sys.modules[_PACKAGE] = bare
    return importlib.import_module(f"{_PACKAGE}.kernels")


def has_gpu() -> bool:
    """Whether torch sees a GPU of NVIDIA's; a piece is told."""
    if KNOWN in os.environ:
        return os.environ[KNOWN] == "1"
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available() and torch.version.cuda is not None


def is_interpreted() -> bool:
    """Whether kernels run interpreted, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def need_gpu() -> None:
    """Raises: Skip: there is no GPU, or kernels are interpreted."""
    if not has_gpu():
        raise Skip("no NVIDIA GPU that torch can use")
    if is_interpreted():
        raise Skip("TRITON_INTERPRET=1: interpreted kernels say nothing about time")
