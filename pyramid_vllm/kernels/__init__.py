"""Scores, selection and compaction: torch references, independent of vLLM."""

from pyramid_vllm.kernels.compact import compact
from pyramid_vllm.kernels.score import (
    accumulated_scores,
    key_diff_scores,
    key_norm_scores,
    pooled,
    recency_scores,
    vote_scores,
    window_scores,
)
from pyramid_vllm.kernels.select import select_tokens

__all__ = [
    "accumulated_scores",
    "compact",
    "key_diff_scores",
    "key_norm_scores",
    "pooled",
    "recency_scores",
    "select_tokens",
    "vote_scores",
    "window_scores",
]
