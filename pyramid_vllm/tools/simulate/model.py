"""What a model costs, from its configuration alone: parameters, bytes, FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pyramid_vllm.tools.model_config import FileConfig, read_config

DTYPE_BYTES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0}
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
    """The sizes of a decoder that its work follows from.

    Gated MLPs are taken for granted (three matrices); biases and norms are left out.
    """

    name: str
    config: Mapping[str, Any]
    """The content of ``config.json``."""
    dtype: str
    """Of activations and of the KV cache."""
    tensor_parallel: int

    @cached_property
    def num_layers(self) -> int:
        """Layers, of any kind."""
        return int(self.config["num_hidden_layers"])

    @cached_property
    def hidden_size(self) -> int:
        """Of the residual stream."""
        return int(self.config["hidden_size"])

    @cached_property
    def num_heads(self) -> int:
        """Query heads of all devices."""
        return int(self.config["num_attention_heads"])

    @cached_property
    def num_kv_heads(self) -> int:
        """KV heads of all devices."""
        return int(self.config.get("num_key_value_heads") or self.num_heads)

    @property
    def num_kv_heads_per_device(self) -> int:
        """vLLM gives each device one at least."""
        return max(1, self.num_kv_heads // self.tensor_parallel)

    @cached_property
    def head_size(self) -> int:
        """Of queries, keys and values."""
        found = self.config.get("head_dim")
        return int(found or self.hidden_size // self.num_heads)

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer; None: full attention."""
        window = self.config.get("sliding_window")
        kinds = self.config.get("layer_types")
        if kinds is not None:
            return tuple(
                int(window) if kind == "sliding_attention" and window else None
                for kind in kinds
            )
        uses = self.config.get("use_sliding_window", True) and window
        return (int(window) if uses and window else None,) * self.num_layers

    @property
    def dtype_bytes(self) -> float:
        """Bytes of an activation or of a number in the KV cache."""
        return DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> float:
        """KV bytes of a token in one layer on one device."""
        heads = self.num_kv_heads_per_device
        return 2 * heads * self.head_size * self.dtype_bytes

    # Parameters.

    @cached_property
    def attention_params(self) -> int:
        """Of a layer: the four projections."""
        query = self.num_heads * self.head_size
        key_value = 2 * self.num_kv_heads * self.head_size
        return self.hidden_size * (2 * query + key_value)

    @cached_property
    def expert_params(self) -> int:
        """Of a layer's MLP, or of one expert of it."""
        config = self.config
        inner = config.get("moe_intermediate_size") or config["intermediate_size"]
        return 3 * self.hidden_size * int(inner)

    @cached_property
    def num_experts(self) -> int:
        """Experts of a layer; 1: a dense MLP."""
        for key in ("num_local_experts", "num_experts"):
            if self.config.get(key):
                return int(self.config[key])
        return 1

    @cached_property
    def num_active_experts(self) -> int:
        """Experts that a token passes."""
        return int(self.config.get("num_experts_per_tok") or 1)

    @cached_property
    def head_params(self) -> int:
        """Of the matrix from the last hidden state to logits."""
        return self.hidden_size * int(self.config["vocab_size"])

    @cached_property
    def _weight_bytes(self) -> float:
        """Bytes of a number of the MLPs' weights."""
        quantization = self.config.get("quantization_config") or {}
        method = quantization.get("quant_method")
        return float(_QUANTIZED_BYTES.get(str(method), self.dtype_bytes))

    def layer_bytes(self, num_rows: float) -> float:
        """Weight bytes of one layer that ``num_rows`` rows read, all devices.

        Rows choose experts independently: of E experts, k a row, a share of
        1 - (1 - k/E)^rows is read.
        """
        share = 1 - (1 - self.num_active_experts / self.num_experts) ** num_rows
        experts = self.num_experts * (1.0 if self.num_experts == 1 else share)
        return (
            self.attention_params * self.dtype_bytes
            + experts * self.expert_params * self._weight_bytes
        )

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of all weights, all devices."""
        mlps = self.num_experts * self.expert_params * self._weight_bytes
        layer = self.attention_params * self.dtype_bytes + mlps
        tied = bool(self.config.get("tie_word_embeddings"))
        embeddings = self.head_params * self.dtype_bytes * (1 if tied else 2)
        return self.num_layers * layer + embeddings

    @cached_property
    def layer_flops(self) -> float:
        """FLOPs of one row in one layer's matrices, all devices."""
        mlp = self.num_active_experts * self.expert_params
        return 2.0 * (self.attention_params + mlp)


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
    name = str(dtype or config.get("dtype") or "bfloat16").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        valid = ", ".join(DTYPE_BYTES)
        raise ValueError(f"--dtype is '{name}': valid is one of {valid}")
    work = ModelWork(Path(model).name, config, name, tensor_parallel)
    if work.num_heads % tensor_parallel:
        raise ValueError(
            f"--tensor-parallel is {tensor_parallel}: valid are divisors of the "
            f"model's {work.num_heads} attention heads"
        )
    return work
