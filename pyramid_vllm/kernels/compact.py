"""Moving kept keys and values to the front of a request's pages."""

import torch


def compact_in_place(
    key: torch.Tensor, value: torch.Tensor, block_ids: torch.Tensor, kept: torch.Tensor
) -> None:
    """Gather a request's kept tokens into the first slots of its pages.

    Safe for overlapping ranges: all tokens are read before the first is written.

    Args:
        key: ``[num_blocks, num_kv_heads, block_size, head_size]``, any strides.
        value: the same shape, for the values.
        block_ids: ``[num_request_blocks]``, int, the request's pages in order.
        kept: ``[num_groups, num_kept]``, int64, ascending; token ``i`` of the request
            lies in slot ``i``. One group for all KV heads, or one for each.
    """
    block_size = key.shape[2]
    block_ids = block_ids.long()
    target = torch.arange(kept.shape[1], device=key.device)
    to_block, to_offset = block_ids[target // block_size], target % block_size
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


def compact_range(
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    group: int,
    num_held: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """Drop tokens of one group of each request and close the gap behind it.

    Safe for overlapping ranges: all tokens are read before the first is written.

    Args:
        key: ``[num_blocks, num_kv_heads, block_size, head_size]``, any strides.
        value: the same shape, for the values.
        block_table: ``[num_requests, max_blocks]``, int64, the requests' pages.
        starts: ``[num_requests]``, int64, first token of the group.
        group: tokens of the group.
        num_held: ``[num_requests]``, int64, cached tokens with the whole group.
        kept: ``[num_requests, 1 or num_kv_heads, num_kept]``, int64, ascending, places
            within the group that stay.
    """
    num_requests, num_groups, num_kept = kept.shape
    block_size = key.shape[2]
    behind = num_held - starts - group
    moved = num_kept + behind
    request = torch.repeat_interleave(torch.arange(num_requests), moved)
    place = torch.arange(len(request)) - (moved.cumsum(0) - moved)[request]
    in_group = place < num_kept
    # [num_groups, tokens moved]: where each comes from, behind the group's start
    chosen = kept.transpose(0, 1)[:, request, place.clamp(max=num_kept - 1)]
    source = torch.where(in_group, chosen, place + (group - num_kept))
    source, target = source + starts[request], place + starts[request]
    to_block, to_offset = (
        block_table[request, target // block_size],
        target % block_size,
    )
    from_block = block_table[request, source // block_size]
    from_offset = source % block_size
    if num_groups == 1:
        for cache in (key, value):
            cache[to_block, :, to_offset] = cache[from_block[0], :, from_offset[0]]
        return
    heads = torch.arange(key.shape[1], device=key.device)[:, None]
    for cache in (key, value):
        cache[to_block, heads, to_offset] = cache[from_block, heads, from_offset]
