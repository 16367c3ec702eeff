"""A stand-in for the prefill of a Llama-3-8B: one layer's products and attention."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from gpu_check.workload import Sizes

_HIDDEN, _INTERMEDIATE = 4096, 14336


class PrefillLayer:
    """One layer with random weights.

    Norms, rotary positions and the activation are left out: the share of the policy
    is rather told too large than too small.

    Args:
        sizes: of the heads and of the prompt.
        device: where.
    """

    def __init__(
        self,
        sizes: Sizes,
        device: str,
        hidden: int = _HIDDEN,
        intermediate: int = _INTERMEDIATE,
    ) -> None:
        self._sizes = sizes
        heads = sizes.num_heads + 2 * sizes.num_kv_heads

        def weight(rows: int, columns: int) -> torch.Tensor:
            values = torch.randn(rows, columns, dtype=sizes.dtype, device=device)
            return values * rows**-0.5

        self._qkv = weight(hidden, heads * sizes.head_size)
        self._out = weight(sizes.num_heads * sizes.head_size, hidden)
        self._gate_up = weight(hidden, 2 * intermediate)
        self._down = weight(intermediate, hidden)
        self._x = weight(sizes.num_tokens, hidden)
        self._intermediate = intermediate

    def run(self) -> torch.Tensor:
        """The prompt's rows behind the layer."""
        sizes = self._sizes
        rows = self._x @ self._qkv
        heads = rows.view(1, len(rows), -1, sizes.head_size).transpose(1, 2)
        counts = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
        query, key, value = heads.split(counts, dim=1)
        attended = scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        x = attended.transpose(1, 2).reshape(len(rows), -1) @ self._out
        gated = (x @ self._gate_up)[:, : self._intermediate]
        return gated @ self._down
