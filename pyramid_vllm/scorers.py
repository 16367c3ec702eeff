"""Score functions of the built-in scorers."""

from typing import NamedTuple, Protocol

import torch

from pyramid_vllm.kernels import (
    accumulated_scores,
    key_diff_scores,
    key_norm_scores,
    pooled,
    recency_scores,
    vote_scores,
    window_scores,
)
from pyramid_vllm.policy import PolicyConfig


class ScoreInputs(NamedTuple):
    """The input of a scorer: one request in one layer."""

    query: torch.Tensor | None
    """``[num_queries, num_heads, head_size]``, newest tokens; None: not read."""
    key: torch.Tensor
    """``[num_tokens, num_kv_heads, head_size]``, oldest first."""
    scale: float
    logits_soft_cap: float
    sink_logits: torch.Tensor | None
    """``[num_heads]``: see ``window_scores``."""
    num_recent: int
    """Number of newest tokens that are kept whatever their score."""

    @property
    def softmax(self) -> tuple[float, torch.Tensor | None]:
        """Soft cap and sink logits of the layer's attention."""
        return self.logits_soft_cap, self.sink_logits


class ScoreFunction(Protocol):
    """Computes scores from a layer's queries and keys for a ``Scorer``."""

    def __call__(self, inputs: ScoreInputs, config: PolicyConfig) -> torch.Tensor:
        """``[num_kv_heads or 1, num_tokens]``, float32; high scores are kept."""


def attention(inputs: ScoreInputs, config: PolicyConfig) -> torch.Tensor:
    """Attention paid by the newest tokens: see ``window_scores``."""
    query, key, scale = inputs.query, inputs.key, inputs.scale
    assert query is not None
    return window_scores(query, key, scale, config.distance_weight, *inputs.softmax)


def accumulated(inputs: ScoreInputs, config: PolicyConfig) -> torch.Tensor:
    """Attention paid by the chunk's tokens: see ``accumulated_scores``."""
    assert inputs.query is not None
    return accumulated_scores(inputs.query, inputs.key, inputs.scale, *inputs.softmax)


def votes(inputs: ScoreInputs, config: PolicyConfig) -> torch.Tensor:
    """Votes of the newest tokens: see ``vote_scores``."""
    assert inputs.query is not None
    return vote_scores(inputs.query, inputs.key, inputs.scale, *inputs.softmax)


def key_norm(inputs: ScoreInputs, config: PolicyConfig) -> torch.Tensor:
    """Keys of small norm score high: see ``key_norm_scores``."""
    return key_norm_scores(inputs.key)


def key_diff(inputs: ScoreInputs, config: PolicyConfig) -> torch.Tensor:
    """Keys unlike the others score high: see ``key_diff_scores``."""
    return key_diff_scores(inputs.key)


def recency(inputs: ScoreInputs, config: PolicyConfig) -> torch.Tensor:
    """Newer tokens score higher: see ``recency_scores``."""
    return recency_scores(inputs.key.shape[0], inputs.key.device)


def scored(inputs: ScoreInputs, config: PolicyConfig) -> torch.Tensor:
    """Scores of a policy's scorer for one request in one layer.

    Returns:
        ``[num_kv_heads or 1, num_tokens]``, float32.

    Raises:
        RuntimeError: the scorer returned another shape or type.
    """
    scores: torch.Tensor = config.scoring(inputs, config)
    num_tokens, num_heads, _ = inputs.key.shape
    rows = 1 if config.scoring.is_same_for_all_heads else num_heads
    if scores.shape != (rows, num_tokens) or scores.dtype != torch.float32:
        raise RuntimeError(
            f"KV policy: scorer '{config.scorer}' gave {scores.dtype} of shape "
            f"{tuple(scores.shape)}: valid is torch.float32 of {(rows, num_tokens)}"
        )
    return scores


def layer_scores(inputs: ScoreInputs, config: PolicyConfig) -> torch.Tensor:
    """``scored``, pooled if the policy pools."""
    scores = scored(inputs, config)
    if not config.pools:
        return scores
    return pooled(scores, inputs.num_recent, config.pooling, config.pool_kernel)
