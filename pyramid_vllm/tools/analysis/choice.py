"""Which tokens of a prompt a layer keeps, and which of its rows it computes.

The choices are those of the worker: the same rule, scores and selection.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyramid_vllm import scorers
from pyramid_vllm.kernels import select_tokens
from pyramid_vllm.policy import LengthRule, PolicyConfig, Queries


@dataclass
class LayerCache:
    """Keys, values and newest queries of a sequence in one layer."""

    key: torch.Tensor
    """``[num_kv_heads, num_tokens, head_size]``, rotated."""
    value: torch.Tensor
    """The same shape."""
    query: torch.Tensor
    """``[num_queries, num_heads, head_size]``, of the newest tokens."""
    scale: float


def choose(
    cache: LayerCache, config: PolicyConfig, rule: LengthRule, num_kept: int, end: int
) -> torch.Tensor:
    """Tokens of a layer that stay: ``[num_kv_heads or 1, num_kept]``, ascending.

    Args:
        cache: the layer's, of the whole prompt.
        config: how to choose.
        rule: how long windows are.
        num_kept: how many stay.
        end: length of the prompt.
    """
    num_recent = rule.num_recent(end)
    num_queries = num_queries_read(rule, end)
    inputs = scorers.ScoreInputs(
        query=cache.query[-num_queries:] if num_queries else None,
        key=cache.key.transpose(0, 1),
        scale=cache.scale,
        logits_soft_cap=0.0,
        sink_logits=None,
        num_recent=num_recent,
    )
    scores = scorers.layer_scores(inputs, config)
    if config.selection == "layer":
        scores = scores.mean(dim=0, keepdim=True)
    return select_tokens(scores, num_kept, config.sinks, num_recent)


def num_queries_read(rule: LengthRule, num_tokens: int) -> int:
    """Newest of a whole prompt's queries that the rule's scorer reads."""
    if rule.config.scored_queries is Queries.ALL:
        return num_tokens
    return rule.num_queries(num_tokens)


def gathered(cache: LayerCache, kept: torch.Tensor) -> LayerCache:
    """The kept tokens alone."""
    heads, _, size = cache.key.shape
    index = kept.expand(heads, -1)[..., None].expand(-1, -1, size)
    key, value = cache.key.gather(1, index), cache.value.gather(1, index)
    return LayerCache(key, value, cache.query, cache.scale)


class Pruning:
    """Rows that layers compute, narrowed from tier to tier."""

    def __init__(self, rule: LengthRule, num_tokens: int) -> None:
        self._rule, self._num_tokens = rule, num_tokens
        self._rows = rule.num_rows(0, num_tokens)
        self._tiers = rule.layout.tier_of_layer
        self._next: torch.Tensor | None = None
        """Places, among the rows computed so far, of those that the next layer does."""
        self._left: torch.Tensor | None = None
        """Places in the prompt of the rows still computed; None is all."""

    def after(self, layer: int, cache: LayerCache) -> None:
        """Choose the next tier's rows, at a tier's end."""
        tier = self._tiers[layer]
        last = layer + 1 == len(self._tiers) or self._tiers[layer + 1] != tier
        if not last or tier + 1 == self._rule.layout.num_tiers:
            return
        if self._rows[tier + 1] < cache.key.shape[1]:
            config = self._rule.config.model_copy(update={"selection": "layer"})
            self._next = choose(
                cache, config, self._rule, self._rows[tier + 1], self._num_tokens
            )[0]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook of a layer: drop the rows that it is not to compute."""
        rows, self._next = self._next, None
        if rows is not None:
            self._left = rows if self._left is None else self._left[rows]
        if self._left is None:
            return args, kwargs
        values = dict(kwargs)
        if rows is not None:
            args = (args[0][:, rows], *args[1:])
        cos, sin = values["position_embeddings"]
        values["position_embeddings"] = (cos[:, self._left], sin[:, self._left])
        return args, values
