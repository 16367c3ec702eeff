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
    num_groups, num_tokens = scores.shape
    num_scored = num_kept - num_sinks - num_recent
    if num_scored < 0 or num_kept > num_tokens:
        raise ValueError(
            f"num_kept={num_kept}: valid is {num_sinks + num_recent} to {num_tokens}"
        )
    middle = scores[:, num_sinks : num_tokens - num_recent]
    # Newest first, so that a stable sort prefers it among equals.
    newest_first = middle.flip(1)
    order = newest_first.argsort(dim=1, descending=True, stable=True)[:, :num_scored]
    chosen = num_sinks + (middle.shape[1] - 1 - order)
    always = torch.cat(
        (
            torch.arange(num_sinks, device=scores.device),
            torch.arange(num_tokens - num_recent, num_tokens, device=scores.device),
        )
    ).expand(num_groups, -1)
    return torch.cat((always, chosen), dim=1).sort(dim=1).values
