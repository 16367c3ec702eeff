"""Scores, selection and compaction: torch references, independent of vLLM."""

from pyramid_vllm.kernels.compact import compact_in_place
from pyramid_vllm.kernels.score import recency_scores, window_scores
from pyramid_vllm.kernels.select import select_tokens

__all__ = ["compact_in_place", "recency_scores", "select_tokens", "window_scores"]
