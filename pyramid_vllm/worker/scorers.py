"""Scorers by the names of ``pyramid_vllm.policy.SCORERS``."""

from typing import Protocol

import torch

from pyramid_vllm.kernels import recency_scores, window_scores
from pyramid_vllm.policy import PolicyConfig


class Scorer(Protocol):
    """From a window's queries and a request's keys to scores."""

    def __call__(
        self,
        query: torch.Tensor | None,
        key: torch.Tensor,
        scale: float,
        logits_soft_cap: float,
        config: PolicyConfig,
    ) -> torch.Tensor:
        """``[num_kv_heads or 1, num_tokens]``, float32; more is more important."""


def attention(
    query: torch.Tensor | None,
    key: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
    config: PolicyConfig,
) -> torch.Tensor:
    """Attention paid by the recent window: see ``window_scores``."""
    assert query is not None
    return window_scores(query, key, scale, config.distance_weight, logits_soft_cap)


def recency(
    query: torch.Tensor | None,
    key: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
    config: PolicyConfig,
) -> torch.Tensor:
    """Newer is better: see ``recency_scores``."""
    return recency_scores(key.shape[0], key.device)


SCORERS: dict[str, Scorer] = {"attention": attention, "recency": recency}
