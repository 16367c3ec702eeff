"""Access to a layer's KV cache, to score and move its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from pyramid_vllm.attention.layout import KVViews
from pyramid_vllm.kernels.kernel_set import KernelSet
from pyramid_vllm.policy import KVPolicyError


class KVAccess(ABC):
    """A layer's cache in the layout of its backend.

    Args:
        layer: vLLM's attention layer.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.impl = layer, layer.impl

    def check_movable(self) -> None:
        """Refuse attention that depends on a token's slot in the cache.

        Raises:
            KVPolicyError: names the feature.
        """
        if self.impl.alibi_slopes is not None:
            raise KVPolicyError(
                "kv_policy does not support attention with alibi_slopes"
            )

    @abstractmethod
    def views(self, cache: torch.Tensor) -> KVViews:
        """Views of keys and values in a cache with the layer's layout."""

    @abstractmethod
    def kernels(self) -> KernelSet:
        """The kernel set that reads the cache."""

    @abstractmethod
    def check(self, builder: Any) -> None:
        """Check ``views`` against the backend's own write.

        Args:
            builder: the metadata builder of the layer's group.

        Raises:
            KVPolicyError: the backend has another layout.
        """
