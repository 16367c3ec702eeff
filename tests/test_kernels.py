"""The torch references against slower, simpler forms of the same formulas."""

import math

import pytest
import torch

from pyramid_vllm.kernels import (
    accumulated_scores,
    compact,
    key_diff_scores,
    key_norm_scores,
    pooled,
    recency_scores,
    select_tokens,
    vote_scores,
    window_scores,
)
from pyramid_vllm.kernels import score as score_module


def scores_by_loops(
    query: torch.Tensor, key: torch.Tensor, scale: float, weight: float, cap: float
) -> torch.Tensor:
    """Scores of one query and one head at a time, in float64."""
    num_queries, num_heads, _ = query.shape
    num_tokens, num_kv_heads, _ = key.shape
    per_kv = num_heads // num_kv_heads
    weights = [
        1 + (weight - 1) * i / max(1, num_queries - 1) for i in range(num_queries)
    ]
    result = torch.zeros(num_kv_heads, num_tokens, dtype=torch.float64)
    for head in range(num_heads):
        for i in range(num_queries):
            seen = num_tokens - num_queries + i + 1
            logits = (
                key[:seen, head // per_kv].double() @ query[i, head].double() * scale
            )
            if cap:
                logits = cap * torch.tanh(logits / cap)
            share = torch.softmax(logits, 0) * weights[i] / sum(weights) / per_kv
            result[head // per_kv, :seen] += share
    return result


@pytest.mark.parametrize("num_tokens", [1, 2, 33, 129])
@pytest.mark.parametrize("num_queries", [1, 2, 16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_window_scores(
    num_tokens: int, num_queries: int, num_heads: int, num_kv_heads: int, cap: float
) -> None:
    num_queries = min(num_queries, num_tokens)
    torch.manual_seed(num_tokens)
    query = torch.randn(num_queries, num_heads, 8)
    key = torch.randn(num_tokens, num_kv_heads, 8)
    scores = window_scores(query, key, 1 / math.sqrt(8), 1.5, cap)
    expected = scores_by_loops(query, key, 1 / math.sqrt(8), 1.5, cap)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.sum(1), torch.ones(num_kv_heads))


def test_recency_prefers_newer_tokens() -> None:
    kept = select_tokens(recency_scores(20, torch.device("cpu")), 9, 2, 3)
    assert kept.tolist() == [[0, 1, 13, 14, 15, 16, 17, 18, 19]]


def select_by_sorting(
    row: list[float], kept: int, sinks: int, recent: int
) -> list[int]:
    """Sort (score, position) pairs: of equal scores the newer position wins."""
    middle = range(sinks, len(row) - recent)
    best = sorted(middle, key=lambda i: (row[i], i), reverse=True)
    chosen = best[: kept - sinks - recent]
    return sorted([*range(sinks), *chosen, *range(len(row) - recent, len(row))])


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 300])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_selection_is_exact_and_breaks_ties_to_the_newer(
    num_tokens: int, levels: int
) -> None:
    torch.manual_seed(levels)
    scores = torch.randint(0, levels, (3, num_tokens)).float()
    sinks, recent = num_tokens // 10, num_tokens // 5
    for kept in {sinks + recent, (sinks + recent + num_tokens) // 2, num_tokens}:
        chosen = select_tokens(scores, kept, sinks, recent)
        for row, indices in zip(scores.tolist(), chosen.tolist(), strict=True):
            assert indices == select_by_sorting(row, kept, sinks, recent)


@pytest.mark.parametrize("kept", [4, 11])
def test_selection_refuses_impossible_counts(kept: int) -> None:
    with pytest.raises(ValueError, match=f"num_kept={kept}: valid is 5 to 10"):
        select_tokens(torch.zeros(1, 10), kept, 2, 3)


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_compaction_moves_kept_tokens_and_nothing_else(
    num_groups: int, transposed: bool
) -> None:
    """This also holds where source and target overlap, and through strided views."""
    torch.manual_seed(0)
    num_blocks, num_heads, block_size, head_size, num_tokens = 7, 2, 4, 3, 18
    shape = (num_blocks, num_heads, block_size, head_size)
    if transposed:
        store = torch.randn(num_blocks, num_heads, head_size, block_size)
        key = store.transpose(2, 3)
    else:
        key = torch.randn(shape)
    value = torch.randn(shape)
    before = key.clone(), value.clone()
    block_ids = torch.tensor([5, 0, 3, 6, 1], dtype=torch.int32)
    kept = torch.stack(
        [torch.randperm(num_tokens)[:11].sort().values for _ in range(num_groups)]
    )
    compact(key, value, block_ids, block_ids, kept)
    for cache, old in zip((key, value), before, strict=True):
        for head in range(num_heads):
            source = kept[head if num_groups > 1 else 0].tolist()
            for slot, token in enumerate(source):
                new_place = cache[block_ids[slot // 4], head, slot % 4]
                old_place = old[block_ids[token // 4], head, token % 4]
                assert torch.equal(new_place, old_place)
        for block in (2, 4):
            assert torch.equal(cache[block], old[block]), "another request's page"


def attention_by_loops(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``[num_heads, num_queries, num_tokens]``, float64."""
    num_queries, num_heads, head_size = query.shape
    num_tokens, num_kv_heads, _ = key.shape
    result = torch.zeros(num_heads, num_queries, num_tokens, dtype=torch.float64)
    for head in range(num_heads):
        for i in range(num_queries):
            seen = num_tokens - num_queries + i + 1
            keys = key[:seen, head * num_kv_heads // num_heads].double()
            logits = keys @ query[i, head].double() / math.sqrt(head_size)
            result[head, i, :seen] = torch.softmax(logits, 0)
    return result


@pytest.mark.parametrize("num_queries", [1, 5, 40])
@pytest.mark.parametrize("max_elements", [1, 700, 1 << 23])
def test_accumulated_and_vote_scores(
    num_queries: int, max_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result does not depend on how few probabilities are held at once."""
    monkeypatch.setattr(score_module, "_MAX_ELEMENTS", max_elements)
    torch.manual_seed(num_queries)
    query, key = torch.randn(num_queries, 4, 8), torch.randn(40, 2, 8)
    attention = attention_by_loops(query, key)
    expected = attention.sum(1).view(2, 2, 40).mean(1)
    scores = accumulated_scores(query, key, 1 / math.sqrt(8))
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-6)
    seen = torch.arange(40 - num_queries + 1, 41)
    votes = (attention * seen[:, None] >= 1).double().sum(1).view(2, 2, 40).mean(1)
    voted = vote_scores(query, key, 1 / math.sqrt(8))
    assert torch.equal(voted, votes.float())
    weighed = window_scores(query, key, 1 / math.sqrt(8), 1.4)
    torch.testing.assert_close(
        weighed,
        scores_by_loops(query, key, 1 / math.sqrt(8), 1.4, 0).float(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_small_keys_score_high() -> None:
    key = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 2.0]]])
    assert key_norm_scores(key).tolist() == [[-5.0, -1.0, -2.0]]


def test_keys_unlike_the_others_score_high() -> None:
    """Lengths do not count: the mean is of keys of length 1."""
    key = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]], [[0.0, 2.0]]])
    expected = torch.tensor([[-2 / 3, -2 / 3, -1 / 3]])
    torch.testing.assert_close(key_diff_scores(key), expected)


def test_pooling_shares_scores_before_the_window() -> None:
    scores = torch.tensor([[0.0, 3.0, 0.0, 0.0, 6.0, 9.0]])
    assert pooled(scores, 1, "avg", 3).tolist() == [[1.0, 1.0, 1.0, 2.0, 2.0, 9.0]]
    assert pooled(scores, 1, "max", 3).tolist() == [[3.0, 3.0, 3.0, 6.0, 6.0, 9.0]]
    assert torch.equal(pooled(scores, 6, "avg", 3), scores)


@pytest.mark.parametrize("num_queries", [1, 16])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_sinks_share_in_the_attention(num_queries: int, cap: float) -> None:
    """Each head acts as if it saw one more key with that logit, whose share is lost."""
    torch.manual_seed(0)
    query, key = torch.randn(num_queries, 6, 8), torch.randn(50, 2, 8)
    sinks = torch.tensor([0.0, 3.0, -2.0, 1.0, 6.0, -torch.inf])
    logits = torch.einsum("qhgd,khd->hgqk", query.unflatten(1, (2, 3)), key).double()
    if cap:
        logits = cap * torch.tanh(logits / cap)
    future = torch.ones(num_queries, 50, dtype=torch.bool).triu(50 - num_queries + 1)
    logits = logits.masked_fill(future, -torch.inf)
    column = sinks.double().view(2, 3, 1, 1).expand(2, 3, num_queries, 1)
    dense = torch.cat((logits, column), -1).softmax(-1)[..., :-1]
    weights = torch.linspace(1, 1.5, num_queries).double()
    window = torch.einsum("hgqk,q->hk", dense, weights / weights.sum()) / 3
    seen = torch.arange(50 - num_queries, 50)[:, None] + 1
    votes = (dense * seen >= 1).double().sum((1, 2)) / 3
    for scores, expected in (
        (window_scores(query, key, 1.0, 1.5, cap, sinks), window),
        (accumulated_scores(query, key, 1.0, cap, sinks), dense.sum(2).mean(1)),
        (vote_scores(query, key, 1.0, cap, sinks), votes),
    ):
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
