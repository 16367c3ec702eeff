"""vLLM's CPU platform with a Ray device key."""

from vllm.platforms.cpu import CpuPlatform

from pyramid_vllm.ray.platform import DEVICE_KEY


class RayCpuPlatform(CpuPlatform):
    """Takes one logical GPU for each worker."""

    ray_device_key: str = DEVICE_KEY
