"""The workers' side of a KV policy: tokens and scores."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyramid_vllm.worker.cpu import PyramidCPUWorker
    from pyramid_vllm.worker.gpu import PyramidGPUWorker

__all__ = ["PyramidCPUWorker", "PyramidGPUWorker"]


def __getattr__(name: str) -> Any:
    # Each imports vLLM's worker of its device, which others may not have.
    if name == "PyramidCPUWorker":
        from pyramid_vllm.worker.cpu import PyramidCPUWorker

        return PyramidCPUWorker
    if name == "PyramidGPUWorker":
        from pyramid_vllm.worker.gpu import PyramidGPUWorker

        return PyramidGPUWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
