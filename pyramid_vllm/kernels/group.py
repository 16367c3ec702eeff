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
) -> torch.Tensor:
    """Attention that the newest generated tokens pay to a group of older ones.

    The score of ``window_scores``, for the group alone: PyramidInfer (arXiv
    2405.12532, section 4.3). ``num_batch`` counts requests and layers together.

    Args:
        query: ``[num_batch, max_queries, num_heads, head_size]``, newest last; of a
            row the last ``num_queries`` count.
        key: ``[num_batch, max_tokens, num_kv_heads, head_size]``, oldest first.
        num_held: ``[num_batch]``, int64, cached tokens of each row; the last
            ``num_queries`` of them belong to the queries.
        num_queries: ``[num_batch]``, int64.
        starts: ``[num_batch]``, int64, first token of the group.
        group: tokens of the group.
        scale: factor of the attention logits.
        distance_weight: weight of the newest query; weights rise linearly from 1 with
            the oldest.
        logits_soft_cap: ``cap * tanh(logits / cap)`` where it is not 0.

    Returns:
        ``[num_batch, num_kv_heads, group]``, float32.
    """
    num_batch, max_queries, num_heads, head_size = query.shape
    max_tokens, num_kv_heads = key.shape[1:3]
    heads = num_heads // num_kv_heads
    rows = query.float().view(num_batch, max_queries, num_kv_heads, heads, head_size)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(num_batch, num_kv_heads, -1, head_size)
    logits = (rows @ key.float().permute(0, 2, 3, 1)) * scale
    if logits_soft_cap:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    logits = logits.view(num_batch, num_kv_heads, heads, max_queries, max_tokens)
    # Query i from the end sees all but the i newest tokens.
    age = torch.arange(max_queries - 1, -1, -1, device=key.device)
    visible = num_held[:, None] - age
    token = torch.arange(max_tokens, device=key.device)
    hidden = token >= visible[..., None]
    logits.masked_fill_(hidden[:, None, None], float("-inf"))
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    columns = starts[:, None] + torch.arange(group, device=key.device)
    columns = columns[:, None, None, None].expand(*logits.shape[:4], group)
    probabilities = (logits.gather(-1, columns) - normalizer).exp().mean(dim=2)
    place = (num_queries[:, None] - 1 - age).float()
    span = (num_queries[:, None] - 1).clamp(min=1)
    weights = 1 + (distance_weight - 1) * place / span
    # One query alone has the weight of the oldest, as linspace has it.
    weights = weights.masked_fill(place < 0, 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bhqg,bq->bhg", probabilities, weights)


def select_in_group(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The best-scored tokens of each group.

    Args:
        scores: ``[..., group]``, float32.
        num_kept: tokens to keep, 1 to ``group``.

    Returns:
        ``[..., num_kept]``, int64, ascending. Of equal scores the newer token stays.
    """
    group = scores.shape[-1]
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return (group - 1 - order[..., :num_kept]).sort(dim=-1).values
