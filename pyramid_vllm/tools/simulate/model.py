"""Parameters, bytes and FLOPs of a model, from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramid_vllm.model_shape import DTYPE_BYTES, ModelShape
from pyramid_vllm.tools.model_config import FileConfig, read_config

#: Bytes of a weight by ``quant_method``. MXFP4: 4 bits, and 8 for each 32 of them
#: (OCP Microscaling Formats, version 1.0, section 5.2).
_QUANTIZED_BYTES = {"mxfp4": 4.25 / 8, "fp8": 1.0}
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelWork:
    """The sizes of a decoder that its work follows from, of all devices.

    Gated MLPs are taken for granted (three matrices); biases and norms are left out.
    """

    name: str
    config: Mapping[str, Any]
    """The content of ``config.json``."""
    dtype: str
    """Dtype of activations and of the KV cache."""
    tensor_parallel: int
    num_layers: int
    """Layers of every kind."""
    hidden_size: int
    num_heads: int
    num_kv_heads_per_device: int
    head_size: int
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None: full attention."""
    attention_params: int
    """Parameters of a layer's four projections."""
    expert_params: int
    """Parameters of a layer's MLP, or of one of its experts."""
    num_experts: int
    """Experts of a layer; 1: a dense MLP."""
    num_active_experts: int
    """Experts that a token passes."""
    head_params: int
    """Parameters of the matrix from the last hidden state to logits."""
    mlp_bytes: float
    """Bytes of a number of the MLPs' weights."""

    @property
    def dtype_bytes(self) -> int:
        """Bytes of an activation or of a number in the KV cache."""
        return DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """KV bytes of a token in one layer on one device."""
        return 2 * self.num_kv_heads_per_device * self.head_size * self.dtype_bytes

    def layer_bytes(self, num_rows: float) -> float:
        """Weight bytes of one layer that ``num_rows`` rows read.

        Rows choose experts independently: of E experts, k a row, a share of
        1 - (1 - k/E)^rows is read.
        """
        share: float = 1 - (1 - self.num_active_experts / self.num_experts) ** num_rows
        experts = self.num_experts * share
        attention = self.attention_params * self.dtype_bytes
        return attention + experts * self.expert_params * self.mlp_bytes

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        tied = bool(self.config.get("tie_word_embeddings"))
        embeddings = self.head_params * self.dtype_bytes * (1 if tied else 2)
        return self.num_layers * self.layer_bytes(math.inf) + embeddings

    @property
    def layer_flops(self) -> float:
        """FLOPs of one row in one layer's matrices."""
        mlp = self.num_active_experts * self.expert_params
        return 2.0 * (self.attention_params + mlp)


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if kinds is None:
        uses = bool(config.get("use_sliding_window", True))
        kinds = ["sliding_attention" if uses else ""] * int(config["num_hidden_layers"])
    return tuple(
        int(window) if kind == "sliding_attention" and window else None
        for kind in kinds
    )


def load_model(model: str, dtype: str | None, tensor_parallel: int) -> ModelWork:
    """Read a model's configuration.

    Args:
        model: a folder, a bundled shape's name or a hub name.
        dtype: of activations and of the KV cache; None: the model's.
        tensor_parallel: devices.

    Raises:
        ValueError: it lacks a size, or an argument does not fit; names it, its value
            and what is valid.
        OSError: there is no such model.
    """
    found = read_config(model).get_text_config()
    config = vars(found) if isinstance(found, FileConfig) else found.to_dict()
    missing = [key for key in _NEEDED if not config.get(key)]
    if missing:
        raise ValueError(
            f"MODEL is '{model}': its configuration has no {', '.join(missing)}; valid "
            "are decoders of the Llama kind, dense or with experts"
        )
    shape = ModelShape.of(found, dtype)
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    if heads % tensor_parallel:
        raise ValueError(
            f"--tensor-parallel is {tensor_parallel}: valid are divisors of the "
            f"model's {heads} attention heads"
        )
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    method = (config.get("quantization_config") or {}).get("quant_method")
    return ModelWork(
        name=Path(model).name,
        config=config,
        dtype=shape.dtype,
        tensor_parallel=tensor_parallel,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        num_heads=heads,
        # vLLM gives each device at least one head.
        num_kv_heads_per_device=max(1, shape.num_kv_heads // tensor_parallel),
        head_size=shape.head_size,
        windows=_windows(config),
        attention_params=hidden * 2 * (heads + shape.num_kv_heads) * shape.head_size,
        expert_params=3 * hidden * int(inner),
        num_experts=int(experts),
        num_active_experts=int(config.get("num_experts_per_tok") or 1),
        head_params=hidden * int(config["vocab_size"]),
        mlp_bytes=_QUANTIZED_BYTES.get(str(method), DTYPE_BYTES[shape.dtype]),
    )
