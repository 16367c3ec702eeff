"""Compressing groups of generated tokens, many requests and layers at once."""

import torch


def group_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    num_held: torch.Tensor,
    num_queries: torch.Tensor,
    starts: torch.Tensor,
    group: int,
    scale: float,
    distance_weight: float,
    logits_soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that the newest generated tokens pay to a group of older ones.

    The score of ``window_scores``, for the group alone: PyramidInfer (arXiv
    2405.12532, section 4). ``num_batch`` counts requests and layers together.

    Args:
        query: ``[num_batch, max_queries, num_heads, head_size]``, newest last.
        key: ``[num_batch, max_tokens, num_kv_heads, head_size]``, oldest first.
        num_held: ``[num_batch]``, int64, cached tokens of each row; the newest belong
            to the queries.
        num_queries: ``[num_batch]``, int64, newest queries that count.
        starts: ``[num_batch]``, int64, first token of the group.
        group: tokens of the group.
        scale: factor of the attention logits.
        distance_weight: weight of the newest query; weights rise linearly from 1 with
            the oldest.
        logits_soft_cap: ``cap * tanh(logits / cap)`` where it is not 0.
        sink_logits: ``[num_batch, num_heads]``, what else shares in each head's
            attention.

    Returns:
        ``[num_batch, num_kv_heads, group]``, float32.
    """
    logits = _visible_logits(query, key, num_held, scale, logits_soft_cap)
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    if sink_logits is not None:
        shares = sink_logits.view(*logits.shape[:3], 1, 1)
        normalizer = torch.logaddexp(normalizer, shares)
    columns = starts[:, None] + torch.arange(group, device=key.device)
    columns = columns[:, None, None, None].expand(*logits.shape[:4], group)
    probabilities = (logits.gather(-1, columns) - normalizer).exp().mean(dim=2)
    # Places within the window; a single query has the weight of the oldest.
    place = num_queries[:, None] - 1 - _age(query)
    span = (num_queries[:, None] - 1).clamp(min=1)
    weights = 1 + (distance_weight - 1) * place / span
    weights = weights.masked_fill(place < 0, 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bhqg,bq->bhg", probabilities, weights)


def _age(query: torch.Tensor) -> torch.Tensor:
    """``[max_queries]``: how many queries are newer."""
    return torch.arange(query.shape[1] - 1, -1, -1, device=query.device)


def _visible_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    num_held: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
) -> torch.Tensor:
    """``[num_batch, num_kv_heads, heads of each, max_queries, max_tokens]``, float32;
    minus infinity where a query does not see the token."""
    num_batch, max_queries, num_heads, head_size = query.shape
    max_tokens, num_kv_heads = key.shape[1:3]
    heads = num_heads // num_kv_heads
    rows = query.float().view(num_batch, max_queries, num_kv_heads, heads, head_size)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(num_batch, num_kv_heads, -1, head_size)
    logits = (rows @ key.float().permute(0, 2, 3, 1)) * scale
    if logits_soft_cap:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    logits = logits.view(num_batch, num_kv_heads, heads, max_queries, max_tokens)
    visible = num_held[:, None] - _age(query)
    hidden = torch.arange(max_tokens, device=key.device) >= visible[..., None]
    return logits.masked_fill_(hidden[:, None, None], float("-inf"))


def order_of_group(scores: torch.Tensor) -> torch.Tensor:
    """The tokens of each group, the best first; of equal ones the newer.

    Args:
        scores: ``[..., group]``, float32.

    Returns:
        ``[..., group]``, int64.
    """
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return scores.shape[-1] - 1 - order
