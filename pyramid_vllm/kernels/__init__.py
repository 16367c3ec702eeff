"""Scores, selection and compaction: torch references, independent of vLLM."""

from pyramid_vllm.kernels.compact import (
    Moves,
    compact,
    group_moves,
    move_tokens,
)
from pyramid_vllm.kernels.group import group_scores, order_of_group
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
    "Moves",
    "accumulated_scores",
    "compact",
    "group_moves",
    "group_scores",
    "key_norm_scores",
    "move_tokens",
    "order_of_group",
    "pooled",
    "recency_scores",
    "select_tokens",
    "vote_scores",
    "window_scores",
]
