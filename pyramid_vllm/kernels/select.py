"""Which tokens stay."""

import torch


def select_tokens(
    scores: torch.Tensor, num_kept: int, num_sinks: int, num_recent: int
) -> torch.Tensor:
    """The sinks, the recent window and the best-scored tokens between them.

    Args:
        scores: ``[num_groups, num_tokens]``, float32; a group is a layer or a KV head.
        num_kept: tokens to keep, at least ``num_sinks + num_recent``.
        num_sinks: first tokens that always stay.
        num_recent: newest tokens that always stay.

    Returns:
        ``[num_groups, num_kept]``, int64, ascending indices. Of equal scores the newer
        token stays.

    Raises:
        ValueError: ``num_kept`` is not between what must stay and what there is.
    """
    num_tokens = scores.shape[1]
    num_scored = num_kept - num_sinks - num_recent
    if num_scored < 0 or num_kept > num_tokens:
        raise ValueError(
            f"num_kept={num_kept}: valid is {num_sinks + num_recent} to {num_tokens}"
        )
    middle = scores[:, num_sinks : num_tokens - num_recent]
    return keep_best(middle, num_kept, num_sinks, num_tokens)


def keep_best(
    middle: torch.Tensor, num_kept: int, num_first: int, num_tokens: int
) -> torch.Tensor:
    """The same where only the tokens that are chosen from have scores.

    Args:
        middle: ``[num_groups, num_scored]``, float32, their scores.
        num_kept: tokens to keep.
        num_first: tokens before those, all of which stay; so do all after them.
        num_tokens: all tokens.

    Returns:
        ``[num_groups, num_kept]``, int64, ascending indices.
    """
    num_groups, num_scored = middle.shape
    num_chosen = num_kept - (num_tokens - num_scored)
    # Newest first, so that a stable sort prefers it among equals.
    order = middle.flip(1).argsort(dim=1, descending=True, stable=True)
    chosen = num_first + (num_scored - 1 - order[:, :num_chosen])
    always = torch.cat(
        (
            torch.arange(num_first, device=middle.device),
            torch.arange(num_first + num_scored, num_tokens, device=middle.device),
        )
    ).expand(num_groups, -1)
    return torch.cat((always, chosen), dim=1).sort(dim=1).values
