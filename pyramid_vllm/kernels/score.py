"""How much each cached token matters."""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

#: Attention probabilities that are held at once, in elements: 2 MiB of float32 stay in
#: a core's cache.
_MAX_ELEMENTS = 1 << 19


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
    sink_logits: torch.Tensor | None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Attention probabilities of the newest tokens, some queries at a time.

    Args:
        query: ``[num_queries, num_heads, head_size]``, the newest tokens, in order.
        key: ``[num_tokens, num_kv_heads, head_size]``, oldest first; the last
            ``num_queries`` of them belong to the queries.
        scale: factor of the attention logits.
        logits_soft_cap: ``cap * tanh(logits / cap)`` where it is not 0.
        sink_logits: ``[num_heads]``, what else shares in each head's attention.

    Yields:
        The first query's place, and float32 probabilities
        ``[num_kv_heads, heads of each, some queries, tokens they see]``.
    """
    num_queries, num_heads, head_size = query.shape
    num_tokens, num_kv_heads, _ = key.shape
    heads = num_heads // num_kv_heads
    keys = key.float().permute(1, 2, 0)
    rows = (query.float() * scale).view(num_queries, num_kv_heads, heads, head_size)
    rows = rows.permute(1, 2, 0, 3)
    step = max(1, _MAX_ELEMENTS // (num_heads * num_tokens))
    for start in range(0, num_queries, step):
        part = rows[:, :, start : start + step]
        count = part.shape[2]
        # A query sees all but the tokens newer than itself.
        seen = num_tokens - num_queries + start + count
        logits = torch.bmm(part.reshape(num_kv_heads, -1, head_size), keys[..., :seen])
        logits = logits.view(num_kv_heads, heads, count, seen)
        if logits_soft_cap:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        future = torch.ones(count, count, dtype=torch.bool, device=key.device).triu(1)
        logits[..., seen - count :].masked_fill_(future, float("-inf"))
        if sink_logits is None:
            yield start, torch.softmax(logits, dim=-1)
            continue
        shares = sink_logits.float().view(num_kv_heads, heads, 1, 1)
        normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
        yield start, logits.sub_(torch.logaddexp(normalizer, shares)).exp_()


def _summed(
    attention: Iterator[tuple[int, torch.Tensor]],
    key: torch.Tensor,
    count: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``[num_kv_heads, num_tokens]``: what queries count for, mean over query heads.

    Args:
        attention: of ``_attention``.
        key: as given to it.
        count: sums some of its queries; takes what it yields and returns
            ``[num_kv_heads, heads of each, tokens they see]``.
    """
    scores = key.new_zeros((key.shape[1], key.shape[0]), dtype=torch.float32)
    for start, part in attention:
        scores[:, : part.shape[3]] += count(start, part).mean(dim=1)
    return scores


def window_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    distance_weight: float,
    logits_soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that the newest tokens pay to every cached token.

    The pivotal-context score of PyramidInfer (arXiv 2405.12532, section 4): the
    weighted mean, over the queries of the recent window, of the attention
    probabilities; here also the mean over the query heads of each KV head. With one
    query it is TOVA's (arXiv 2401.06104).

    Args:
        query: ``[num_queries, num_heads, head_size]``, the newest tokens, in order.
        key: ``[num_tokens, num_kv_heads, head_size]``, oldest first; the last
            ``num_queries`` of them belong to the queries.
        scale: factor of the attention logits.
        distance_weight: weight of the newest query; weights rise linearly from 1 with
            the oldest.
        logits_soft_cap: ``cap * tanh(logits / cap)`` where it is not 0.
        sink_logits: ``[num_heads]``, what else shares in each head's attention.

    Returns:
        ``[num_kv_heads, num_tokens]``, float32; each row sums to 1 without sinks.
    """
    weights = torch.linspace(1.0, distance_weight, len(query), device=key.device)
    weights = weights / weights.sum()

    def count(start: int, part: torch.Tensor) -> torch.Tensor:
        return torch.matmul(weights[start : start + part.shape[2]], part)

    attention = _attention(query, key, scale, logits_soft_cap, sink_logits)
    return _summed(attention, key, count)


def accumulated_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that every cached token has got from the given queries.

    The heavy-hitter score of H2O (arXiv 2306.14048, section 4): the sum, over queries,
    of the attention probabilities; here also the mean over the query heads of each KV
    head. Chunks of a prompt add up.

    Args:
        query: ``[num_queries, num_heads, head_size]``, the newest tokens, in order.
        key: ``[num_tokens, num_kv_heads, head_size]``, oldest first.
        scale: factor of the attention logits.
        logits_soft_cap: ``cap * tanh(logits / cap)`` where it is not 0.
        sink_logits: ``[num_heads]``, what else shares in each head's attention.

    Returns:
        ``[num_kv_heads, num_tokens]``, float32; each row sums to ``num_queries``, if
        there are no sinks.
    """
    attention = _attention(query, key, scale, logits_soft_cap, sink_logits)
    return _summed(attention, key, lambda _, part: part.sum(dim=2))


def vote_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Votes that every cached token gets from the newest ones.

    CORM (arXiv 2404.15949, section 4): a query that sees ``t`` keys votes for those to
    which it pays at least ``1 / t`` of its attention; here a query's vote is the share
    of the KV head's query heads that vote.

    Args:
        query: ``[num_queries, num_heads, head_size]``, the newest tokens, in order.
        key: ``[num_tokens, num_kv_heads, head_size]``, oldest first.
        scale: factor of the attention logits.
        logits_soft_cap: ``cap * tanh(logits / cap)`` where it is not 0.
        sink_logits: ``[num_heads]``, what else shares in each head's attention.

    Returns:
        ``[num_kv_heads, num_tokens]``, float32, in votes.
    """

    def count(start: int, part: torch.Tensor) -> torch.Tensor:
        first = len(key) - len(query) + start + 1
        seen = torch.arange(first, first + part.shape[2], device=key.device)
        return (part * seen[:, None] >= 1.0).float().sum(dim=2)

    attention = _attention(query, key, scale, logits_soft_cap, sink_logits)
    return _summed(attention, key, count)


def key_norm_scores(key: torch.Tensor) -> torch.Tensor:
    """Keys of small L2 norm score high (arXiv 2406.11430).

    Args:
        key: ``[num_tokens, num_kv_heads, head_size]``.

    Returns:
        ``[num_kv_heads, num_tokens]``, float32: the negative norm.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(key.float(), dim=-1)
    return -norm.T


def key_diff_scores(key: torch.Tensor) -> torch.Tensor:
    """Keys that are unlike the others score high.

    KeyDiff (arXiv 2504.15364, section 3.3): the negative cosine similarity of a key and
    the mean of all keys, each of length 1; here not divided by the mean's length, which
    is the same for all.

    Args:
        key: ``[num_tokens, num_kv_heads, head_size]``.

    Returns:
        ``[num_kv_heads, num_tokens]``, float32.
    """
    unit = functional.normalize(key.float(), dim=-1)
    return -torch.einsum("thd,hd->ht", unit, unit.mean(dim=0))


def recency_scores(num_tokens: int, device: torch.device) -> torch.Tensor:
    """``[1, num_tokens]``, float32: newer tokens score higher.

    StreamingLLM (arXiv 2309.17453): with the sinks kept, what stays is the newest.
    """
    return torch.arange(num_tokens, dtype=torch.float32, device=device)[None]


def pooled(
    scores: torch.Tensor, num_recent: int, kind: str, kernel: int
) -> torch.Tensor:
    """Scores that the tokens before the recent window share with their neighbours.

    SnapKV (arXiv 2404.14469, section 4): what stays are clusters of tokens, not single
    ones. Beyond the ends lie zeros.

    Args:
        scores: ``[num_groups, num_tokens]``, float32.
        num_recent: newest tokens, left as they are.
        kind: ``avg`` or ``max``.
        kernel: tokens that are pooled, an odd number.

    Returns:
        The same shape.
    """
    context = scores.shape[1] - num_recent
    if context <= 0:
        return scores
    pool = functional.avg_pool1d if kind == "avg" else functional.max_pool1d
    middle = pool(scores[None, :, :context], kernel, stride=1, padding=kernel // 2)[0]
    return torch.cat((middle, scores[:, context:]), dim=1)
