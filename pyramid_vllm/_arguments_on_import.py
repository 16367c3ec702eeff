"""Registers the plugin when vLLM's engine arguments are imported.

Cause: ``LLM(..., kv_policy=...)`` reaches ``EngineArgs`` before vLLM loads its plugins,
so ``import pyramid_vllm`` must register the plugin. But importing vLLM would cost every
user of this package many seconds, even for ``--help``. Removal: once vLLM loads its
plugins before it builds ``EngineArgs``.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_TARGET = "vllm.engine.arg_utils"


class _RegisterAfter(Loader):
    """Runs a module's own loader, then registers the plugin."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        from pyramid_vllm.plugin import register

        register()


class _TargetFinder(MetaPathFinder):
    """Finds vLLM's engine arguments, once."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def expect_vllm() -> None:
    """Register now if vLLM's engine arguments are imported, else on their import."""
    if _TARGET in sys.modules:
        # Partly imported while vLLM itself loads this plugin and registers it.
        if hasattr(sys.modules[_TARGET], "AsyncEngineArgs"):
            from pyramid_vllm.plugin import register

            register()
    elif not any(isinstance(finder, _TargetFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TargetFinder())
