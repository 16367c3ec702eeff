"""Moving kept keys and values to the front of a request's pages."""

import numpy as np
import numpy.typing as npt
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
    spans: npt.NDArray[np.int32],
    kept: torch.Tensor,
    targets: torch.Tensor | None = None,
) -> None:
    """``compact`` for some requests in some layers, one layer after the other.

    A layer's tokens are all read before the first is written. Only the index arrays
    are made on the host, once for all layers: nothing waits for the device.

    Args:
        keys: the layers' keys.
        values: their values.
        block_table: ``[num_rows, max_blocks]``, int32.
        spans: ``[len(Spans._fields), num_requests]``, on the host; read are ``row``,
            ``num_held``, ``num_kept``, ``num_first`` and ``offset``.
        kept: ``[num_layers, 1 or num_kv_heads, num_scores]``, int32, from ``select``.
        targets: ``[num_requests, max_blocks]``, int32: pages to write; None: those
            that the tokens lie in, where the first ``num_first`` tokens stay.
    """
    moved = _moved(spans, whole=targets is not None)
    if not moved.size:
        return
    device, page = block_table.device, keys.like.shape[2]
    indices = torch.from_numpy(moved)
    if device.type == "cuda":
        indices = indices.pin_memory().to(device, non_blocking=True)
    row, place, index, request = indices
    to_table, to_row = (block_table, row) if targets is None else (targets, request)
    to_block, to_offset = to_table[to_row, place // page].long(), place % page
    num_heads = keys.like.shape[1]
    heads = torch.arange(num_heads, device=device)[:, None]
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


def _moved(spans: npt.NDArray[np.int32], whole: bool) -> npt.NDArray[np.int64]:
    """What moves of some requests.

    Args:
        spans: of the requests.
        whole: whether the first tokens move too.

    Returns:
        ``[4, num_moves]``: row of the token's request, its new place, where its old
        one stands among the kept indices, and its request.
    """
    fields = dict(zip(Spans._fields, spans.astype(np.int64), strict=True))
    first = 0 * fields["num_first"] if whole else fields["num_first"]
    moves = fields["num_kept"] < fields["num_held"]
    counts = np.where(moves, fields["num_kept"] - first, 0)
    request = np.repeat(np.arange(len(counts)), counts)
    begin = np.repeat(counts.cumsum() - counts, counts)
    place = np.arange(len(request)) - begin + first[request]
    index = fields["offset"][request] + place
    return np.stack((fields["row"][request], place, index, request))
