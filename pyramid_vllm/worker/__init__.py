"""The workers' side of a KV policy: tokens and scores."""

from pyramid_vllm.worker.cpu import PyramidCPUWorker

__all__ = ["PyramidCPUWorker"]
