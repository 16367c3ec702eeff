"""Memory that steps use again and again."""

from __future__ import annotations

import math

import torch

#: Most normalizers of attention that a launch computes at once, and most parts of
#: them, whatever it scores; one request may have more.
MAX_NORMALIZERS = 1 << 23
#: Bytes of the keys and values of several layers that wait to be moved; those of one
#: layer may be more.
WAITING_BYTES = 128 * 2**20


def room(size: int) -> int:
    """Elements of the buffer that ``Scratch`` makes for ``size``: up to an eighth more,
    or every longer prompt would allocate."""
    step = 1 << max(0, (size - 1).bit_length() - 4)
    return -(-size // step) * step


class Scratch:
    """Buffers by name, as large as the largest use of them so far.

    Steps allocate nothing once each has seen its largest.

    Args:
        device: where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

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
            # The smaller one goes first: both together were not budgeted.
            buffer = None
            self._buffers.pop(name, None)
            buffer = torch.zeros(room(size), dtype=dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)
