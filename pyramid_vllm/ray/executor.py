"""vLLM's Ray executor on clusters without GPUs.

Cause: ``CpuPlatform`` has no Ray device key, so vLLM refuses Ray on it. Removal: once
it has one; then use ``distributed_executor_backend="ray"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from vllm.platforms import current_platform
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from pyramid_vllm.ray.platform import DEVICE_KEY, VARIABLE


class CPURayExecutor(RayExecutorV2):
    """A ``distributed_executor_backend`` that takes one logical GPU for each worker.

    Works with or without a KV policy.
    """

    def _build_runtime_env(self) -> dict[str, Any]:
        """Set the variable by which workers choose their platform on import."""
        runtime_env: dict[str, Any] = super()._build_runtime_env()
        runtime_env["env_vars"][VARIABLE] = "1"
        return runtime_env

    def _init_executor(self) -> None:
        """Start the workers.

        Raises:
            ValueError: this platform or the cluster lacks what the workers need.
        """
        _check_platform()
        if not ray.is_initialized():
            _connect(self.parallel_config.ray_runtime_env)
        if not self._has_placement_group():
            _check_cluster(self.parallel_config.world_size)
        with _device_key():
            super()._init_executor()

    def _has_placement_group(self) -> bool:
        given = self.parallel_config.placement_group
        return bool(given or ray.util.get_current_placement_group())


def _check_platform() -> None:
    if not current_platform.is_cpu():
        raise ValueError(
            "distributed_executor_backend is pyramid_vllm.ray.CPURayExecutor, but "
            f"vLLM's platform is {current_platform.device_name!r}: valid there is 'ray'"
        )


def _connect(runtime_env: Any) -> None:
    """Join a running cluster: one that vLLM starts has no logical GPUs."""
    try:
        ray.init("auto", runtime_env=runtime_env)
    except ConnectionError as error:
        raise ValueError(
            "pyramid_vllm.ray.CPURayExecutor found no Ray cluster: start one with "
            "`ray start --head --num-gpus=N`, and set RAY_ADDRESS if it runs elsewhere"
        ) from error


def _check_cluster(world_size: int) -> None:
    """Refuse a cluster for which vLLM would wait half an hour in vain."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_devices = int(resources.get(DEVICE_KEY, 0))
    if num_devices < world_size:
        raise ValueError(
            f"an engine of {world_size} workers (tensor_parallel_size) needs as many "
            f"logical GPUs, the Ray cluster has {num_devices}: start its nodes with "
            "`ray start ... --num-gpus=N`, where N is a node's number of workers"
        )


@contextmanager
def _device_key() -> Iterator[None]:
    """Give this process's platform a device key while vLLM places its workers."""
    before = current_platform.ray_device_key
    current_platform.ray_device_key = DEVICE_KEY
    try:
        yield
    finally:
        current_platform.ray_device_key = before
