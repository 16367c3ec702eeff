"""What a step sends to the device at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d


class Upload:
    """Arrays that go to the device in one copy."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.int32]] = []

    def add(self, array: npt.NDArray[Any]) -> int:
        """Take an array along; its place is where ``send`` returns it."""
        self._arrays.append(np.ascontiguousarray(array, dtype=np.int32))
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> list[torch.Tensor]:
        """The same arrays, int32, on the device."""
        if device.type == "cpu" or not self._arrays:
            return [torch.from_numpy(array) for array in self._arrays]
        flat = np.concatenate([array.ravel() for array in self._arrays])
        sent = async_tensor_h2d(flat, device=device)
        parts = sent.split([array.size for array in self._arrays])
        return [
            part.view(array.shape)
            for part, array in zip(parts, self._arrays, strict=True)
        ]
