"""Moving kept keys and values to the front of a request's pages."""

from typing import NamedTuple

import torch


def compact(
    key: torch.Tensor,
    value: torch.Tensor,
    block_ids: torch.Tensor,
    target_ids: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """Gather a request's kept tokens into the first slots of some pages.

    These may be the pages that the tokens lie in, in any order: all tokens are read
    before the first is written.

    Args:
        key: ``[num_blocks, num_kv_heads, block_size, head_size]``, any strides.
        value: the same shape, for the values.
        block_ids: ``[num_request_blocks]``, int, the request's pages in order.
        target_ids: ``[num_target_blocks]``, int, the pages to write, in order.
        kept: ``[num_groups, num_kept]``, int64, ascending; token ``i`` of the request
            lies in slot ``i``. One group for all KV heads, or one for each.
    """
    block_size = key.shape[2]
    block_ids, target_ids = block_ids.long(), target_ids.long()
    target = torch.arange(kept.shape[1], device=key.device)
    to_block, to_offset = target_ids[target // block_size], target % block_size
    if kept.shape[0] == 1:
        from_block, from_offset = block_ids[kept[0] // block_size], kept[0] % block_size
        for cache in (key, value):
            cache[to_block, :, to_offset] = cache[from_block, :, from_offset]
        return
    heads = torch.arange(key.shape[1], device=key.device)[:, None]
    from_block, from_offset = block_ids[kept // block_size], kept % block_size
    for cache in (key, value):
        moved = cache[from_block, heads, from_offset]
        cache[to_block[None], heads, to_offset[None]] = moved


class Moves(NamedTuple):
    """Where cached tokens come from and go to, page and place within it.

    All are ``[..., num_requests, 1 or num_kv_heads, num_moves]``, int64.
    """

    from_block: torch.Tensor
    from_offset: torch.Tensor
    to_block: torch.Tensor
    to_offset: torch.Tensor


def group_moves(
    block_table: torch.Tensor,
    block_size: int,
    starts: torch.Tensor,
    num_held: torch.Tensor,
    order: torch.Tensor,
    num_kept: torch.Tensor,
) -> Moves:
    """Moves that keep the best tokens of a group and close the gap behind it.

    ``...`` are any dimensions, such as layers.

    Args:
        block_table: ``[..., num_requests, max_blocks]``, int64, the requests' pages.
        block_size: tokens of a page.
        starts: ``[..., num_requests]``, int64, first token of the group.
        num_held: ``[..., num_requests]``, int64, cached tokens with the whole group.
        order: ``[..., num_requests, 1 or num_kv_heads, group]``, int64, the places
            within the group, the best first.
        num_kept: ``[..., num_requests]``, int64, how many stay, at least one.

    Returns:
        Moves of rows that have fewer than others repeat their last one.
    """
    group = order.shape[-1]
    kept, start = num_kept[..., None, None], starts[..., None, None]
    best = torch.arange(group, device=order.device) < kept
    chosen = torch.where(best, order, group).sort(dim=-1).values
    moved = kept + num_held[..., None, None] - start - group
    place = torch.arange(int(moved.max()), device=order.device)
    place = torch.minimum(place, moved - 1).expand(*order.shape[:-1], -1)
    in_group = chosen.gather(-1, place.clamp(max=group - 1))
    source = torch.where(place < kept, in_group, place + group - kept) + start
    target = place + start
    table = block_table[..., None, :].expand(*order.shape[:-1], -1)
    return Moves(
        from_block=table.gather(-1, source // block_size),
        from_offset=source % block_size,
        to_block=table.gather(-1, target // block_size),
        to_offset=target % block_size,
    )


def move_tokens(key: torch.Tensor, value: torch.Tensor, moves: Moves) -> None:
    """Move cached tokens of one layer.

    Safe for overlapping ranges: all tokens are read before the first is written.

    Args:
        key: ``[num_blocks, num_kv_heads, block_size, head_size]``, any strides.
        value: the same shape, for the values.
        moves: each ``[num_requests, 1 or num_kv_heads, num_moves]``.
    """
    if moves.to_block.shape[1] == 1:
        from_block, from_offset, to_block, to_offset = (m.flatten() for m in moves)
        for cache in (key, value):
            cache[to_block, :, to_offset] = cache[from_block, :, from_offset]
        return
    heads = torch.arange(key.shape[1], device=key.device)[:, None]
    for cache in (key, value):
        moved = cache[moves.from_block, heads, moves.from_offset]
        cache[moves.to_block, heads, moves.to_offset] = moved
