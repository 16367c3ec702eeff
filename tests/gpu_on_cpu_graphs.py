"""Full CUDA graphs as far as a CPU has them.

A graph keeps the call that was captured, and a replay makes it again with the metadata
of the capture: what a step changes counts only where it is written into the buffers
that the capture saw, as on a GPU. Unlike there, the model's Python runs again: what it
must not see then, ``Graph.around`` hides.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from tests.gpu_on_cpu_kernels import CALLS


class Graph:
    """In place of ``torch.cuda.CUDAGraph``."""

    captured: Callable[[Any], None]
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around every replay."""

    def __init__(self) -> None:
        self._forward = Graph.captured

    def replay(self) -> None:
        from vllm.config import CUDAGraphMode

        CALLS["replay"] += 1
        with Graph.around():
            self._forward(CUDAGraphMode.NONE)


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def use_full_graphs(mode: str = "FULL_DECODE_ONLY", max_tokens: int = 16) -> None:
    """Let the engines made from now on capture graphs; once in a process.

    Args:
        mode: ``FULL_DECODE_ONLY`` or ``FULL``.
        max_tokens: Steps of more tokens run without a graph.
    """
    if torch.cuda.CUDAGraph is Graph:
        raise RuntimeError("graphs are in use already")
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.workspace import init_workspace_manager

    capture = cudagraph_utils.CudaGraphManager.capture
    initialize = GPUModelRunner.initialize_kv_cache
    warm_up = CPUWorker.compile_or_warm_up_model

    def capturing(self: Any, create: Any, *args: Any) -> None:
        def creating(*args: Any, **kwargs: Any) -> Any:
            Graph.captured = create(*args, **kwargs)
            return Graph.captured

        capture(self, creating, *args)

    def initializing(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The CPU's platform has taken them out.
        config = self.vllm_config.compilation_config
        config.cudagraph_mode = CUDAGraphMode[mode]
        config.cudagraph_capture_sizes = [2**i for i in range(max_tokens.bit_length())]
        config.max_cudagraph_capture_size = config.cudagraph_capture_sizes[-1]
        return initialize(self, *args, **kwargs)

    def warming_up(self: Any) -> Any:
        times = warm_up(self)
        init_workspace_manager(self.device)
        self.model_runner.capture_model()
        return times

    patched: Any = cudagraph_utils
    patched.CudaGraphManager.capture = capturing
    patched.graph_capture = patched.capture_pool = _nothing
    GPUModelRunner.initialize_kv_cache = initializing
    CPUWorker.compile_or_warm_up_model = warming_up
    type(current_platform).get_global_graph_pool = lambda _: None
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, _nothing
