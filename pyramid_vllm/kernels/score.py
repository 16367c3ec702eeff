"""How much each cached token matters."""

import torch


def window_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    distance_weight: float,
    logits_soft_cap: float = 0.0,
) -> torch.Tensor:
    """Attention that the newest tokens pay to every cached token.

    The pivotal-context score of PyramidInfer (arXiv 2405.12532, section 4.2): the
    weighted mean, over the queries of the recent window, of the attention
    probabilities; here also the mean over the query heads of each KV head.

    Args:
        query: ``[num_queries, num_heads, head_size]``, the newest tokens, in order.
        key: ``[num_tokens, num_kv_heads, head_size]``, oldest first; the last
            ``num_queries`` of them belong to the queries.
        scale: factor of the attention logits.
        distance_weight: weight of the newest query; weights rise linearly from 1 with
            the oldest.
        logits_soft_cap: ``cap * tanh(logits / cap)`` where it is not 0.

    Returns:
        ``[num_kv_heads, num_tokens]``, float32; each row sums to 1.
    """
    num_queries, num_heads, head_size = query.shape
    num_tokens, num_kv_heads, _ = key.shape
    grouped = query.float().view(num_queries, num_kv_heads, -1, head_size)
    # [num_kv_heads, heads of it * num_queries, head_size]
    rows = grouped.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_size)
    logits = torch.bmm(rows, key.float().permute(1, 2, 0)) * scale
    if logits_soft_cap:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    logits = logits.view(num_kv_heads, num_heads // num_kv_heads, num_queries, -1)
    window = logits[..., num_tokens - num_queries :]
    future = torch.ones(num_queries, num_queries, dtype=torch.bool, device=key.device)
    window.masked_fill_(future.triu(1), float("-inf"))
    probabilities = torch.softmax(logits, dim=-1).mean(dim=1)
    weights = torch.linspace(1.0, distance_weight, num_queries, device=key.device)
    return torch.einsum("hqt,q->ht", probabilities, weights / weights.sum())


def recency_scores(num_tokens: int, device: torch.device) -> torch.Tensor:
    """``[1, num_tokens]``, float32: newer tokens score higher.

    StreamingLLM (arXiv 2309.17453): with the sinks kept, what stays is the newest.
    """
    return torch.arange(num_tokens, dtype=torch.float32, device=device)[None]
