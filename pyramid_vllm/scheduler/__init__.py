"""The scheduler's side of a KV policy: counts and pages."""

from pyramid_vllm.scheduler.scheduler import PyramidScheduler

__all__ = ["PyramidScheduler"]
