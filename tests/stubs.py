"""A stand-in for torchvision, whose registry wheels do not load beside CPU torch.

vLLM's Qwen-VL models import it for images; prompts of text need nothing of it.
"""

import importlib.metadata
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_VERSION = "0.28.0"
_MODES = (
    "NEAREST",
    "BILINEAR",
    "BICUBIC",
    "BOX",
    "HAMMING",
    "LANCZOS",
    "NEAREST_EXACT",
)


class _Anything(ModuleType):
    """A module that has whatever is asked for, as an empty class."""

    __version__ = _VERSION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {mode: mode for mode in _MODES})


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for_torchvision() -> None:
    """Call it before transformers or vLLM are imported, in a process of its own."""
    sys.meta_path.insert(0, _Finder())
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        _VERSION if name == "torchvision" else version(name)
    )
