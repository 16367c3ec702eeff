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
