"""The newest queries of generating requests, which score what they generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from pyramid_vllm.worker.step import BatchRows


class QueryShape(NamedTuple):
    """Size of a buffer of queries."""

    num_layers: int
    """Tiered layers of this worker."""
    max_num_seqs: int
    """Most requests at once."""
    num_queries: int
    """Queries of a request."""
    num_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        elements = self.num_layers * self.max_num_seqs * self.num_queries
        return elements * self.num_heads * self.head_size * self.dtype.itemsize


class GeneratedRows(NamedTuple):
    """This step's generated tokens, in the order of the batch; all ``[num_tokens]``."""

    row: torch.Tensor
    """Int64: the request's row."""
    from_end: torch.Tensor
    """Int64: 1 is a request's newest token, 2 the one before."""
    target: torch.Tensor
    """Int64: place of its query in the buffer."""
    position: torch.Tensor
    """Int64: its position in the request."""


class QuerySlots:
    """Which requests have a place for their newest queries.

    A request has a slot; the query of position ``p`` lies at ``p % num_queries``.

    Args:
        shape: of the buffer.
    """

    def __init__(self, shape: QueryShape) -> None:
        self.num_queries = shape.num_queries
        self._slot_of: dict[str, int] = {}
        self._free = list(reversed(range(shape.max_num_seqs)))

    def __len__(self) -> int:
        """Requests that have a slot."""
        return len(self._slot_of)

    def slot(self, req_id: str) -> int:
        """The slot of a generating request."""
        return self._slot_of[req_id]

    def release(self, req_ids: Iterable[str]) -> None:
        """Free the slots of requests that finished or were preempted."""
        for req_id in req_ids:
            slot = self._slot_of.pop(req_id, None)
            if slot is not None:
                self._free.append(slot)

    def generated(self, step: BatchRows) -> GeneratedRows:
        """The step's generated tokens that are to be kept, their requests given slots.

        Args:
            step: this step's rows.
        """
        rows, slots, ends, counts = [], [], [], []
        for row, (req_id, end, generated, scheduled) in enumerate(step.progress()):
            if generated <= 0:
                continue
            slot = self._slot_of.get(req_id)
            if slot is None:
                slot = self._slot_of[req_id] = self._free.pop()
            rows.append(row)
            slots.append(slot)
            ends.append(end)
            counts.append(min(scheduled, generated, self.num_queries))
        count = torch.tensor(counts, dtype=torch.int64)
        last = torch.tensor([ends, slots, rows], dtype=torch.int64)
        end, slot_of, row_of = last.repeat_interleave(count, dim=1)
        behind = count.cumsum(0).repeat_interleave(count)
        from_end = behind - torch.arange(len(row_of))
        place = (end - from_end) % self.num_queries
        target = slot_of * self.num_queries + place
        return GeneratedRows(row_of, from_end, target, end - from_end)


class GroupQueries(QuerySlots):
    """The newest queries of every generating request, in every layer, on CPU.

    One buffer for as many requests as run at once, counted against the KV memory.

    Args:
        shape: of the buffer.
    """

    def __init__(self, shape: QueryShape) -> None:
        super().__init__(shape)
        self.buffer = torch.zeros(
            shape.num_layers,
            shape.max_num_seqs * shape.num_queries,
            shape.num_heads,
            shape.head_size,
            dtype=shape.dtype,
        )
        self._generated: GeneratedRows | None = None
        self._step: BatchRows | None = None
        self._sources: dict[int, torch.Tensor] = {}
        """By tier: the rows of its queries that are kept, while ``_step`` runs."""

    def write(
        self, layer: int, tier: int, query: torch.Tensor, step: BatchRows
    ) -> None:
        """Keep a layer's queries of this step's generated tokens.

        Args:
            layer: index of the layer.
            tier: its tier.
            query: ``[num_rows, num_heads, head_size]``.
            step: this step's rows.
        """
        if step is not self._step:
            self._step, self._sources = step, {}
            self._generated = self.generated(step)
        generated = self._generated
        assert generated is not None
        if not len(generated.target):
            return
        source = self._sources.get(tier)
        if source is None:
            source = step.starts[tier, 1:][generated.row] - generated.from_end
            self._sources[tier] = source
        # Where every row is kept, they are so in the batch's order.
        rows = query if len(source) == len(query) else query[source]
        self.buffer[layer].index_copy_(0, generated.target, rows)

    def newest(
        self, layers: Sequence[int], req_ids: Sequence[str], ends: Sequence[int]
    ) -> torch.Tensor:
        """Queries of some requests, newest last.

        Args:
            layers: indices of the layers.
            req_ids: the requests.
            ends: computed tokens of each.

        Returns:
            ``[num_layers, num_requests, num_queries, num_heads, head_size]``
        """
        slots = torch.tensor([self._slot_of[req_id] for req_id in req_ids])
        oldest = torch.tensor(ends)[:, None]
        place = (oldest + torch.arange(self.num_queries)) % self.num_queries
        layer = torch.tensor(layers)[:, None, None]
        return self.buffer[layer, slots[:, None] * self.num_queries + place]
