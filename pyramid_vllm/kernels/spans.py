"""What a launch works on: requests, and the layers that hold their pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Spans(NamedTuple):
    """Requests of one launch, as columns of a device buffer.

    All are ``[num_requests]``, int32, contiguous. A request's tokens lie in its pages
    in order; its scores and kept indices lie in flat buffers, from ``offset`` on.
    """

    row: torch.Tensor
    """Row of the block table."""
    query_start: torch.Tensor
    """First row of its queries, or of its ring of them."""
    ring_start: torch.Tensor
    """Place of the oldest query in the ring; 0 where there is none."""
    num_queries: torch.Tensor
    """Queries that score, the newest of the request; 0: it is not scored."""
    num_held: torch.Tensor
    """Tokens in the pages."""
    num_kept: torch.Tensor
    """Tokens that stay; equal to ``num_held``: nothing moves."""
    num_first: torch.Tensor
    """First tokens that stay whatever their score."""
    num_recent: torch.Tensor
    """Newest tokens that stay whatever their score."""
    column: torch.Tensor
    """First token that has a score."""
    num_columns: torch.Tensor
    """Tokens that have a score."""
    offset: torch.Tensor
    """Place of its first score, and of the first index that is kept from ``column``
    on: all tokens before that stay."""

    @classmethod
    def of(cls, buffer: torch.Tensor) -> Spans:
        """The fields of ``[len(Spans._fields), num_requests]``."""
        return cls(*buffer.unbind(0))

    @property
    def num_requests(self) -> int:
        """Requests."""
        return self.row.shape[0]


class PagedLayers(NamedTuple):
    """Keys or values of several layers whose pages have one shape and one dtype.

    Kernels reach each layer by its address.
    """

    like: torch.Tensor
    """One layer's ``[num_blocks, num_kv_heads, block_size, head_size]``, any strides:
    those of all."""
    addresses: torch.Tensor
    """``[num_layers]``, int64, on the layers' device."""
    alignment: int = 1
    """Bytes, at most 16, that all addresses are multiples of: several elements are
    read at once where that is known."""
    caches: tuple[torch.Tensor, ...] = ()
    """The layers' own tensors, each like ``like``."""

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor]) -> PagedLayers:
        """Of views that have one shape, one dtype and the same strides.

        Raises:
            ValueError: they differ.
        """
        like = caches[0]
        for cache in caches:
            if (
                cache.shape[1:] != like.shape[1:]
                or cache.stride() != like.stride()
                or cache.dtype != like.dtype
            ):
                raise ValueError(
                    f"pages of {tuple(cache.shape)}, strides {cache.stride()} and "
                    f"{cache.dtype}: valid are those of the other layers, "
                    f"{tuple(like.shape)}, {like.stride()} and {like.dtype}"
                )
        pointers = [cache.data_ptr() for cache in caches]
        addresses = torch.tensor(pointers, dtype=torch.int64, device=like.device)
        return cls(like, addresses, math.gcd(16, *pointers), tuple(caches))

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self.addresses.shape[0]

    def layer(self, place: int) -> PagedLayers:
        """One of the layers alone."""
        own = slice(place, place + 1)
        return self._replace(addresses=self.addresses[own], caches=self.caches[own])


class BlockTables(NamedTuple):
    """The block tables of a step, by KV cache group."""

    tensors: Sequence[torch.Tensor]
    """Each ``[num_rows, max_blocks]``, int32, rows contiguous."""
    addresses: torch.Tensor
    """``[num_groups]``, uint64: where they lie."""
    strides: torch.Tensor
    """``[num_groups]``, int64: length of their rows."""

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> BlockTables:
        """Of tables whose addresses are not known yet."""
        return cls(
            tensors,
            torch.tensor([table.data_ptr() for table in tensors], dtype=torch.uint64),
            torch.tensor([table.stride(0) for table in tensors]),
        )


class Attention(NamedTuple):
    """What the attention of some layers is, but for queries and keys."""

    scale: float
    """Factor of the logits."""
    logits_soft_cap: float
    """``cap * tanh(logits / cap)`` where it is not 0."""
    sink_logits: Sequence[torch.Tensor] | None
    """Of each layer ``[num_heads]``, what else shares in each head's attention: the
    weights themselves, which may be loaded anew."""
    query_scale: torch.Tensor
    """``[1]``, float32: factor of quantized queries, else 1."""
    key_scales: torch.Tensor
    """``[num_layers]``, int64: address of each layer's float32 factor of its quantized
    keys, else of 1."""

    def layer(self, place: int, query_scale: torch.Tensor) -> Attention:
        """The same for one of the layers."""
        own = slice(place, place + 1)
        return self._replace(
            sink_logits=None if self.sink_logits is None else self.sink_logits[own],
            query_scale=query_scale,
            key_scales=self.key_scales[own],
        )


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """Eight-bit floats as bytes; anything else as it is."""
    return values.view(torch.uint8) if values.dtype.itemsize == 1 else values
