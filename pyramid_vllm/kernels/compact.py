"""Moving kept keys and values to the front of a request's pages."""

import torch

from pyramid_vllm.kernels.spans import PagedLayers, Spans, as_bytes


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


def compact_requests(
    keys: PagedLayers,
    values: PagedLayers,
    block_table: torch.Tensor,
    spans: Spans,
    kept: torch.Tensor,
    targets: torch.Tensor | None = None,
) -> None:
    """``compact`` for some requests in some layers, one layer after the other.

    A layer's tokens are all read before the first is written; the index arrays are made
    once for all layers. Arguments as of ``compact_triton.compact_pages``, on the host.
    """
    row, request, place, index = _moved(spans)
    if not len(row):
        return
    page = keys.like.shape[2]
    to_block, to_offset = block_table[row, place // page].long(), place % page
    if targets is not None:
        others = targets[request, place // page].long()
        to_block = torch.where(others >= 0, others, to_block)
    heads = torch.arange(keys.like.shape[1])[:, None]
    for key, value, of_layer in zip(keys.caches, values.caches, kept, strict=True):
        source = of_layer[:, index].long()
        from_block, from_offset = block_table[row, source // page].long(), source % page
        for cache in (as_bytes(key), as_bytes(value)):
            if len(source) == 1:
                read = cache[from_block[0], :, from_offset[0]]
                cache[to_block, :, to_offset] = read
            else:
                read = cache[from_block, heads, from_offset]
                cache[to_block[None], heads, to_offset[None]] = read


def _moved(spans: Spans) -> tuple[torch.Tensor, ...]:
    """What moves of some requests: ``[num_moves]``, int64 each: row of the token's
    request, the request, its new place, and where its old one stands in ``kept``."""
    held, kept, first = (
        field.long() for field in (spans.num_held, spans.num_kept, spans.column)
    )
    counts = torch.where(kept < held, kept - first, 0)
    request = torch.repeat_interleave(counts)
    begin = (counts.cumsum(0) - counts)[request]
    place = torch.arange(len(request)) - begin + first[request]
    index = (spans.offset.long() - first)[request] + place
    return spans.row.long()[request], request, place, index
