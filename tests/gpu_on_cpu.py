"""Run vLLM on a CPU as it runs on a GPU: the V2 model runner and the GPUs' backends.

The runner's own kernels are Triton's, which can interpret them. Those of the backends'
attention would take minutes so, or have no source in Python: torch stands in for them.
The backends themselves, their builders included, are vLLM's.

All this is decided when vLLM is imported, so it needs a process of its own::

    result = run_in_process("tests.test_x:function", {"argument": 1})
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
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
    """Set the process up; before vllm and triton are imported."""
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
    """Let engines with a policy use our wrapper of a backend, those without the stock
    one in it."""
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
    """As on a Hopper GPU: version 3 of FlashAttention."""
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
    target: str,
    arguments: dict[str, Any],
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
) -> Any:
    """Call a function in a process that is set up, and hand back what it returns.

    Args:
        target: ``module:function``; the function takes and returns what JSON can hold.
        arguments: Its keyword arguments.
        timeout: Seconds after which the process is ended.
        environment: More variables for the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        call = json.dumps([target, arguments, str(result)])
        done = subprocess.run(
            [sys.executable, "-c", "from tests import gpu_on_cpu; gpu_on_cpu.main()"],
            input=call,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=Path(__file__).parents[1],
            env=os.environ | (environment or {}),
            check=False,
        )
        if done.returncode or not result.exists():
            tail = done.stderr[-_STDERR_CHARS:]
            raise RuntimeError(f"{target} ended with {done.returncode}:\n{tail}")
        return json.loads(result.read_text())


def main() -> None:
    """The process's side of ``run_in_process``."""
    target, arguments, result = json.load(sys.stdin)
    prepare()
    module, function = target.split(":")
    value = getattr(importlib.import_module(module), function)(**arguments)
    Path(result).write_text(json.dumps(value))
