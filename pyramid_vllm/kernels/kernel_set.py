"""What the policy computes on a device: by Triton on GPUs, by torch on CPUs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pyramid_vllm.kernels.scratch import Scratch
from pyramid_vllm.kernels.spans import Attention, BlockTables, PagedLayers, Spans
from pyramid_vllm.policy import PolicyConfig


class KernelSet(Protocol):
    """A module of functions: ``on_torch`` or ``on_triton``.

    Requests lie in pages and are named by ``Spans``; scores and kept indices lie in
    flat buffers ``[num_layers, num_groups, num_scores]``, where a request's begin at
    its ``offset``. A group is a layer or a KV head.
    """

    IS_COMPILED: bool
    """Whether functions are compiled when they are first called."""

    def check_policies(self, policies: Iterable[PolicyConfig]) -> None:
        """Refuse policies that the set cannot compute.

        Raises:
            KVPolicyError: names the setting and what is valid.
        """

    def lengths(
        self,
        seq_lens: torch.Tensor,
        query_starts: torch.Tensor,
        evicted: torch.Tensor,
        tier_of_group: torch.Tensor,
        tables: BlockTables,
        tier_lens: torch.Tensor,
        slots: Any,
        *,
        block_size: int,
        num_rows: torch.Tensor | None = None,
        row_starts: torch.Tensor | None = None,
    ) -> None:
        """Write each tier's cache lengths, and the slots of its new tokens.

        A token's place in the pages is its position less the tokens evicted before it,
        or follows from the rows of its tier where rows are pruned.

        Args:
            seq_lens: ``[num_requests]``, int32, computed tokens with this step's.
            query_starts: ``[num_requests + 1]``, int32, the batch's first rows.
            evicted: ``[num_tiers, num_requests]``, int32.
            tier_of_group: ``[num_groups]``, int32; negative: the group has no tier.
            tables: of the step.
            tier_lens: ``[num_tiers, max_requests]``, int32, to write; 0 for requests
                beyond the batch.
            slots: ``[num_groups, max_tokens]``, int64, or as many tensors; rewritten.
            block_size: tokens of a page.
            num_rows: ``[num_tiers, num_requests]``, int32, rows that each tier
                computes; None: those that were scheduled.
            row_starts: ``[num_tiers, num_requests + 1]``, int32, their first rows.
        """

    def score(
        self,
        config: PolicyConfig,
        attention: Attention,
        query: torch.Tensor,
        query_layers: torch.Tensor,
        keys: PagedLayers,
        block_table: torch.Tensor,
        spans: Spans,
        out: torch.Tensor,
        *,
        max_queries: int,
        max_tokens: int,
        max_columns: int,
        ring: int | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Score cached tokens of some requests in some layers by a policy's scorer.

        Args:
            config: the policy.
            attention: of the layers.
            query: ``[num_query_layers, num_rows, num_heads, head_size]``, any strides.
            query_layers: ``[num_layers]``, int64: which of these is each layer's.
            keys: the layers' keys.
            block_table: ``[num_rows, max_blocks]``, int32.
            spans: the requests; those without queries are left out where the scorer
                reads queries.
            out: ``[num_layers, num_kv_heads, num_scores]``, float32; a scorer that is
                the same for all heads writes the first group alone.
            max_queries: most queries of a request; next: most tokens held, and scored.
            ring: rows of each request's ring of queries; None: queries lie in order.
            scratch: memory that calls share.
        """

    def pool(
        self,
        scores: torch.Tensor,
        out: torch.Tensor,
        spans: Spans,
        kind: str,
        kernel: int,
        *,
        max_tokens: int,
    ) -> None:
        """``pooled`` for some requests.

        Args:
            scores: contiguous, float32.
            out: another tensor of the same shape.
            spans: the requests.
            kind: ``avg`` or ``max``.
            kernel: tokens that are pooled, an odd number.
            max_tokens: most tokens held of a request.
        """

    def select(
        self, scores: torch.Tensor, out: torch.Tensor, spans: Spans, *, max_tokens: int
    ) -> None:
        """``select_tokens`` for some requests.

        Args:
            scores: float32.
            out: int32, the same shape: kept indices, ascending, from ``offset`` on.
            spans: the requests; those that keep all they hold are passed over.
            max_tokens: most tokens held of a request.
        """

    def compact(
        self,
        keys: PagedLayers,
        values: PagedLayers,
        block_table: torch.Tensor,
        spans: Spans,
        on_host: npt.NDArray[np.int32],
        kept: torch.Tensor,
    ) -> None:
        """Gather kept tokens into the first slots of their own pages.

        Args:
            keys: some layers' keys.
            values: their values.
            block_table: ``[num_rows, max_blocks]``, int32.
            spans: the requests.
            on_host: ``[len(Spans._fields), num_requests]``: the same.
            kept: from ``select``.
        """

    def row_indices(
        self,
        starts: torch.Tensor,
        next_starts: torch.Tensor,
        window_of: torch.Tensor,
        kept: torch.Tensor,
        offset: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Indices, among a tier's rows, of those that the next tier computes.

        Args:
            starts: ``[num_requests + 1]``, int32, first rows of the tier.
            next_starts: the same of the next tier.
            window_of: ``[num_requests]``, int32: the request's place in ``offset``;
                negative: its first rows stay.
            kept: ``[num_scores]``, int32: rows that stay, from ``select``.
            offset: ``[num_windows]``, int32: where a window's lie in ``kept``.
            out: ``[num_rows]``, int32, to write.
        """

    def gather_rows(self, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """``source[index]``: ``[num_chosen, width]``; ``index`` is int32."""

    def scatter_rows(
        self, source: torch.Tensor, index: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """``[num_rows, width]``: rows in their places among zeros."""

    def store_queries(
        self,
        query: torch.Tensor,
        target: torch.Tensor,
        positions: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor,
        tags: torch.Tensor,
    ) -> None:
        """Copy the queries of some rows to their places in a buffer.

        Args:
            query: ``[num_rows, num_heads, head_size]``, any strides.
            target: ``[num_rows]`` or longer, int32: each row's place; negative: none.
            positions: ``[num_rows]`` or longer, int32: each row's position.
            scale: ``[1]``, float32: factor of quantized queries, else 1.
            out: ``[num_places, num_heads, head_size]``, contiguous.
            tags: ``[num_places]``, int32: positions of the queries that lie there.
        """

    def count_missing(
        self,
        tags: torch.Tensor,
        spans: Spans,
        first: torch.Tensor,
        missing: torch.Tensor,
        ring: int,
    ) -> None:
        """Count queries that are not those of the positions that are to score.

        Args:
            tags: ``[num_layers, num_places]``, int32, from ``store_queries``.
            spans: the requests.
            first: ``[num_requests]``, int32: position of the oldest query of each.
            missing: ``[1]``, int32: the count is added to it.
            ring: places of each request.
        """
