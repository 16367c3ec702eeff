"""Memory that steps use again and again."""

from __future__ import annotations

import math

import torch


class Scratch:
    """Buffers by name, as large as the largest use of them so far.

    Steps allocate nothing once each has seen its largest.

    Args:
        device: where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def get(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """A contiguous tensor whose content is what the last use left.

        Args:
            name: of the buffer; one use of a name at a time.
            shape: of the tensor.
            dtype: of the tensor, the same at every use.
        """
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # Rounded up, or every longer prompt would allocate.
            room = 1 << max(0, size - 1).bit_length()
            buffer = torch.zeros(room, dtype=dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)
