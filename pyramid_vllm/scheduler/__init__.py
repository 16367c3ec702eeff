"""vLLM's scheduler with a KV policy: counts and pages."""

from pyramid_vllm.scheduler.scheduler import PyramidScheduler

__all__ = ["PyramidScheduler"]
