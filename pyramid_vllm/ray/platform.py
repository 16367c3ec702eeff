"""Chooses the CPU platform that can be used with Ray."""

import logging
import os

#: Set to 1 before vLLM is imported, on nodes and in the process of the engine.
VARIABLE = "PYRAMID_VLLM_RAY_CPU"
#: Ray's resource for a worker's place. vLLM asks Ray for a worker's identifiers of the
#: resource, and Ray returns them only for known accelerators. A node may offer any
#: number of GPUs without having one.
DEVICE_KEY = "GPU"

logger = logging.getLogger(f"vllm.{__name__}")


def register() -> str | None:
    """Entry point of the ``vllm.platform_plugins`` group.

    Returns:
        The platform's class by name; None unless the variable asks for it.
    """
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return None
    if value != "1":
        logger.error("%s is %r: valid are '0' and '1'; ignored", VARIABLE, value)
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        logger.error("%s is 1, but this vLLM is not built for CPUs: ignored", VARIABLE)
        return None
    return "pyramid_vllm.ray.cpu_platform.RayCpuPlatform"
