"""Factors of quantized tensors, which kernels read where vLLM's layers keep them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyramid_vllm.policy import KVPolicyError


def scale_of(layer: Any, name: str) -> torch.Tensor:
    """A layer's factor of quantized tensors: one float32 on the device.

    Args:
        layer: vLLM's attention layer.
        name: of its attribute, such as ``_k_scale``.

    Raises:
        KVPolicyError: it has one for each head.
    """
    scale: torch.Tensor = getattr(layer, name)
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise KVPolicyError(
            f"kv_policy does not support {name} of {scale.numel()} {scale.dtype} "
            "values: valid is one float32 factor of a layer"
        )
    return scale


class KeyScales:
    """Addresses of the factors of quantized keys, of layers that score together.

    vLLM 0.32 and 0.33 reload weights into the tensors that are there. A layer that is
    given another tensor would leave kernels with the address of freed memory.

    Args:
        layers: vLLM's attention layers.
        device: where kernels run.

    Raises:
        KVPolicyError: a layer has a factor for each head.
    """

    def __init__(self, layers: Sequence[Any], device: torch.device) -> None:
        self._layers = layers
        self._known = self._found()
        self.addresses = torch.tensor(self._known, dtype=torch.int64, device=device)
        """``[num_layers]``, int64; the same memory for good."""

    def _found(self) -> list[int]:
        return [scale_of(layer, "_k_scale").data_ptr() for layer in self._layers]

    def refresh(self) -> None:
        """Take the factors of layers that have other tensors than before.

        Raises:
            KVPolicyError: a layer has a factor for each head by now.
        """
        found = self._found()
        if found != self._known:
            self._known = found
            self.addresses.copy_(torch.tensor(found, dtype=torch.int64))
