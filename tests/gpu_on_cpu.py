"""Run vLLM on a CPU as it runs on a GPU: the V2 model runner and the GPUs' backends.

The runner's own kernels are Triton's, which can interpret them. Those of the backends'
attention would take minutes so, or have no source in Python: torch stands in for them.
The backends themselves, their builders included, are vLLM's.

All this is decided when vLLM is imported, so it needs a process of its own::

    result = run_in_process("tests.test_x:function", {"argument": 1})
"""

import functools
import gc
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE": "1024",
    "HF_HUB_OFFLINE": "1",
}
BACKENDS = {
    "CPU_ATTN": "cpu_attn.CPUAttentionBackend",
    "TRITON_ATTN": "triton_attn.TritonAttentionBackend",
    "FLASH_ATTN": "flash_attn.FlashAttentionBackend",
    "FLASHINFER": "flashinfer.FlashInferBackend",
}
_FOLDER = "vllm.v1.attention.backends"
_STDERR_CHARS = 4000


def prepare() -> None:
    """Set the process up; this must be called before vllm and triton are imported."""
    if _InterpretedBackend.is_entered:
        return
    if early := {"triton", "vllm"} & set(sys.modules):
        names = " and ".join(sorted(early))
        raise RuntimeError(f"{names} imported already: call prepare() before")
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import triton.backends

    # vLLM takes Triton for usable where one of its backends has an active driver.
    triton.backends.backends["cpu"] = _InterpretedBackend
    _InterpretedBackend.is_entered = True


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _InterpretedBackend:
    is_entered = False
    driver = _Driver
    compiler = None


def use_backend(name: str, path: str | None = None) -> None:
    """Let the engines made from now on use a backend.

    Args:
        name: One of ``BACKENDS``.
        path: Class to take in place of vLLM's, such as a subclass of it.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; valid: {', '.join(BACKENDS)}")
    if name == "FLASHINFER":
        from tests.gpu_on_cpu_flashinfer import install

        install()
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import (
        AttentionBackendEnum,
        register_backend,
    )

    module = importlib.import_module(f"{_FOLDER}.{BACKENDS[name].split('.')[0]}")
    _REPLACE[name](module)
    # The CPU's platform asks for this entry, whatever is selected.
    register_backend(
        AttentionBackendEnum.CPU_ATTN, path or f"{_FOLDER}.{BACKENDS[name]}"
    )
    selector._cached_get_attn_backend.cache_clear()


def use_wrapped_backend(name: str) -> None:
    """Let engines with a policy use our wrapper of a backend, and other engines the
    stock backend in it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from pyramid_vllm.attention import registry

    path = registry.WRAPPED[AttentionBackendEnum[name]]
    registry.WRAPPED = {AttentionBackendEnum.CPU_ATTN: path}
    use_backend(name, f"pyramid_vllm.attention.{path}")


def _replace_triton(module: Any) -> None:
    from tests import gpu_on_cpu_kernels as kernels

    module.unified_attention = kernels.unified_attention
    module.triton_reshape_and_cache_flash = kernels.write


def _replace_flash(module: Any) -> None:
    """Replace FlashAttention by version 3, as on a Hopper GPU."""
    from vllm.v1.attention.backend import AttentionCGSupport

    from tests import gpu_on_cpu_kernels as kernels

    module.flash_attn_varlen_func = kernels.flash_attn_varlen_func
    module.reshape_and_cache_flash = kernels.write
    module.get_scheduler_metadata = lambda **_: None
    module.get_flash_attn_version = lambda *_, **__: 3
    module.flash_attn_supports_kv_cache_dtype = lambda *_, **__: True
    module.flash_attn_supports_sinks = lambda: True
    module.is_flash_attn_varlen_func_available = lambda: True
    builder = module.FlashAttentionMetadataBuilder
    builder._cudagraph_support = AttentionCGSupport.ALWAYS


def _replace_flashinfer(module: Any) -> None:
    """The wrappers that plan on the CPU, not TensorRT-LLM's kernels."""
    import torch

    from tests import gpu_on_cpu_kernels as kernels

    module.can_use_trtllm_attention = lambda *_, **__: False
    module.use_trtllm_attention = lambda *_, **__: False
    torch.ops._C_cache_ops.reshape_and_cache_flash = kernels.write


_REPLACE: dict[str, Any] = {
    "CPU_ATTN": lambda _: None,
    "TRITON_ATTN": _replace_triton,
    "FLASH_ATTN": _replace_flash,
    "FLASHINFER": _replace_flashinfer,
}


def run_in_process(
    target: str, arguments: dict[str, Any], timeout: float = 120.0
) -> Any:
    """Call a function in a process that is set up, and hand back what it returns.

    Args:
        target: ``module:function``; the function takes and returns what JSON can hold.
        arguments: Its keyword arguments.
        timeout: Seconds after which the process is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = [target, arguments, folder, math.ceil(timeout)]
        status = _server().ask(json.dumps(call))
        result = Path(folder, "result.json")
        if status or not result.exists():
            tail = Path(folder, "log").read_text(errors="replace")[-_STDERR_CHARS:]
            raise RuntimeError(f"{target} ended with {status}:\n{tail}")
        return json.loads(result.read_text())


class _Server:
    """A process that is set up once, and forks for every call: imports take long.

    It ends when its input does: with this process at the latest.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests import gpu_on_cpu; gpu_on_cpu.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def ask(self, call: str) -> int:
        """The exit status of the process that the call got."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(call + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@functools.cache
def _server() -> _Server:
    return _Server()


def main() -> None:
    """The server's side of ``run_in_process``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    for module in ("pyramid_vllm.worker", "vllm", "vllm.v1.worker.gpu.model_runner"):
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _call(*json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, file=answers, flush=True)


def _call(target: str, arguments: dict[str, Any], folder: str, seconds: int) -> None:
    """Make the call in a process of its own, which ends here or at its alarm."""
    with Path(folder, "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.alarm(seconds)
    try:
        module, function = target.split(":")
        value = getattr(importlib.import_module(module), function)(**arguments)
        Path(folder, "result.json").write_text(json.dumps(value))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
