"""vLLM on Ray clusters without GPUs. Clusters with GPUs do not need this."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyramid_vllm.ray.executor import CPURayExecutor

__all__ = ["CPURayExecutor"]


def __getattr__(name: str) -> Any:
    # Imported late: importing vLLM calls the entry point in `platform`.
    if name == "CPURayExecutor":
        from pyramid_vllm.ray.executor import CPURayExecutor

        return CPURayExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
