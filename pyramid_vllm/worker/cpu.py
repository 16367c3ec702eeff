"""vLLM's CPU worker with a KV policy."""

from vllm.v1.worker.cpu_worker import CPUWorker

from pyramid_vllm.worker.tiered import TieredWorker


class PyramidCPUWorker(TieredWorker, CPUWorker):
    """Runs the plan on a CPU, by vLLM's V1 or V2 runner."""
