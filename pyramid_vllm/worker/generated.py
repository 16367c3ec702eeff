"""The newest queries of generating requests, which score what they generated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from pyramid_vllm.kernels.spans import Spans
from pyramid_vllm.worker.rows import BatchRows

if TYPE_CHECKING:
    from pyramid_vllm.kernels.kernel_set import KernelSet


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
        of_prompts: whether queries of prompts are kept too.
    """

    def __init__(self, shape: QueryShape, of_prompts: bool = False) -> None:
        self.num_queries, self._of_prompts = shape.num_queries, of_prompts
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
            num_new = scheduled if self._of_prompts else min(scheduled, generated)
            if num_new <= 0:
                continue
            slot = self._slot_of.get(req_id)
            if slot is None:
                slot = self._slot_of[req_id] = self._free.pop()
            rows.append(row)
            slots.append(slot)
            ends.append(end)
            counts.append(min(num_new, self.num_queries))
        count = torch.tensor(counts, dtype=torch.int64)
        last = torch.tensor([ends, slots, rows], dtype=torch.int64)
        end, slot_of, row_of = last.repeat_interleave(count, dim=1)
        ends_of = count.cumsum(0).repeat_interleave(count)
        from_end = ends_of - torch.arange(len(row_of))
        place = (end - from_end) % self.num_queries
        target = slot_of * self.num_queries + place
        return GeneratedRows(row_of, from_end, target, end - from_end)


class GeneratedQueries(QuerySlots):
    """The newest queries of every generating request, in every layer.

    A replayed graph runs no Python: the copy of queries is part of the graph, and reads
    each row's place from ``target``, which is the same memory at capture and at replay.
    Every query carries its position, so that one that was not copied is noticed.

    Args:
        shape: of the buffer.
        max_num_tokens: most rows of a step.
        device: where the buffer lies.
        kernels: of the device.
        of_prompts: whether queries of prompts are kept too.
    """

    def __init__(
        self,
        shape: QueryShape,
        max_num_tokens: int,
        device: torch.device,
        kernels: KernelSet,
        of_prompts: bool = False,
    ) -> None:
        super().__init__(shape, of_prompts)
        self._kernels = kernels
        places = shape.max_num_seqs * shape.num_queries
        self.buffer = torch.zeros(
            shape.num_layers,
            places,
            shape.num_heads,
            shape.head_size,
            dtype=shape.dtype,
            device=device,
        )
        self._tags = torch.full(
            (shape.num_layers, places), -1, dtype=torch.int32, device=device
        )
        self._target = torch.full(
            (max_num_tokens,), -1, dtype=torch.int32, device=device
        )
        self._position = torch.zeros_like(self._target)
        self._missing = torch.zeros(1, dtype=torch.int32, device=device)
        pin = device.type == "cuda"
        self._missing_on_host = torch.zeros(1, dtype=torch.int32, pin_memory=pin)
        self._rows: BatchRows | None = None
        self._generated: GeneratedRows | None = None
        self._of_tier: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin_step(self, rows: BatchRows) -> None:
        """Find a step's generated tokens, and a place for the query of each."""
        self.check()
        self._rows, self._of_tier = rows, {}
        self._generated = self.generated(rows)
        target, position = self._by_row(0)
        count = len(target)
        async_tensor_h2d(target, out=self._target[:count])
        async_tensor_h2d(position, out=self._position[:count])

    def end_step(self) -> None:
        """Forget the step: a dummy batch may replay its graph."""
        self._target.fill_(-1)
        self._rows = self._generated = None

    def check(self) -> None:
        """Check that queries were copied, by what the device has reported so far.

        A step that compresses by wrong queries spoils the tokens of the next one. Its
        own output is there only after its report, and this is called in between: no
        spoiled token leaves the worker. A rank whose outputs nobody reads finds out
        when it begins a later step.

        Raises:
            RuntimeError: groups were scored with queries of other tokens.
        """
        missing = int(self._missing_on_host[0])
        if missing:
            raise RuntimeError(
                f"KV policy: {missing} queries that score generated tokens were not "
                "copied by the steps that computed them"
            )

    def _by_row(self, tier: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Target and position of each of a tier's rows, int32, on the host."""
        rows, generated = self._rows, self._generated
        assert rows is not None
        assert generated is not None
        target = torch.full((rows.total_rows[tier],), -1, dtype=torch.int32)
        position = torch.zeros_like(target)
        ends = torch.from_numpy(rows.starts[tier, 1:])
        source = ends[generated.row].long() - generated.from_end
        target[source] = generated.target.int()
        position[source] = generated.position.int()
        return target, position

    def write(
        self, layer: int, tier: int, query: torch.Tensor, scale: torch.Tensor
    ) -> None:
        """Keep a layer's queries of this step's generated tokens.

        Args:
            layer: index of the layer.
            tier: its tier.
            query: ``[num_rows, num_heads, head_size]``.
            scale: ``[1]``, float32: factor of quantized queries, else 1.
        """
        target, position = self._target, self._position
        rows, generated = self._rows, self._generated
        if generated is not None and not len(generated.row):
            return
        if rows is not None and rows.is_pruned[tier]:
            if tier not in self._of_tier:
                on_host = self._by_row(tier)
                target, position = (
                    async_tensor_h2d(part, device=query.device) for part in on_host
                )
                self._of_tier[tier] = target, position
            target, position = self._of_tier[tier]
        self._kernels.store_queries(
            query, target, position, scale, self.buffer[layer], self._tags[layer]
        )

    def verify(self, layers: torch.Tensor, spans: Spans, first: torch.Tensor) -> None:
        """Check that queries are those of the positions that are to score.

        The host does not wait for the result: ``check`` raises once it is there.

        Args:
            layers: ``[num_layers]``, int64.
            spans: the requests.
            first: ``[num_requests]``, int32: position of the oldest query of each.
        """
        tags = self._tags[layers]
        self._kernels.count_missing(tags, spans, first, self._missing, self.num_queries)
        self._missing_on_host.copy_(self._missing, non_blocking=True)
