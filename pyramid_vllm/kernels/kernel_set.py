"""What the policy computes on a device: by Triton on GPUs, by torch on CPUs."""

from collections.abc import Callable
from typing import Protocol

import torch

#: Writes to tensors that it is given.
_Kernel = Callable[..., None]


class KernelSet(Protocol):
    """A module of functions: ``on_torch`` or ``on_triton``.

    Requests lie in pages and are named by ``Spans``; scores and kept indices lie in
    flat buffers ``[num_layers, num_groups, num_scores]``, where a request's begin at
    its ``offset``. A group is a layer or a KV head.
    """

    IS_COMPILED: bool
    """Whether functions are compiled when they are first called."""
    check_policies: _Kernel
    """Refuses policies that the set cannot compute, by a ``KVPolicyError``."""
    lengths: _Kernel
    """Arguments as of ``lengths_triton.tier_lengths``, but for the tables, which are
    ``BlockTables``; slots may be as many tensors as groups."""
    score: _Kernel
    """Arguments as of ``on_torch.score``."""
    pool: _Kernel
    """Arguments as of ``pool_triton.pool_scores``."""
    select: _Kernel
    """Arguments as of ``select_triton.select``."""
    compact: _Kernel
    """Arguments as of ``on_torch.compact``."""
    row_indices: _Kernel
    """Arguments as of ``prune_triton.row_indices``."""
    gather_rows: Callable[..., torch.Tensor]
    """Arguments as of ``prune_triton.gather_rows``."""
    scatter_rows: Callable[..., torch.Tensor]
    """Arguments as of ``prune_triton.scatter_rows``."""
    store_queries: _Kernel
    """Arguments as of ``queries_triton.store_queries``."""
    count_missing: _Kernel
    """Arguments as of ``queries_triton.count_missing``."""
