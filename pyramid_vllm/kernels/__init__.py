"""Scores, selection and compaction: torch references, independent of vLLM."""

from pyramid_vllm.kernels.compact import compact_in_place, compact_range
from pyramid_vllm.kernels.group import group_scores, select_in_group
from pyramid_vllm.kernels.score import (
    accumulated_scores,
    key_norm_scores,
    pooled,
    recency_scores,
    vote_scores,
    window_scores,
)
from pyramid_vllm.kernels.select import select_tokens

__all__ = [
    "accumulated_scores",
    "compact_in_place",
    "compact_range",
    "group_scores",
    "key_norm_scores",
    "pooled",
    "recency_scores",
    "select_in_group",
    "select_tokens",
    "vote_scores",
    "window_scores",
]
