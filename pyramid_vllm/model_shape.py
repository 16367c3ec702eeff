"""KV cache sizes from a model's configuration, without loading the model."""

from dataclasses import dataclass
from typing import Any

_FULL_ATTENTION = ("full_attention", "attention")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def num_full_attention_layers(config: Any) -> int:
    """Number of layers with full attention.

    Args:
        config: a Hugging Face text configuration.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return sum(kind in _FULL_ATTENTION for kind in kinds)
    if getattr(config, "use_sliding_window", True) and getattr(
        config, "sliding_window", None
    ):
        return 0
    if not getattr(config, "num_attention_heads", 0):
        return 0
    return int(config.num_hidden_layers)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine a model's KV memory."""

    num_layers: int
    """Layers with full attention."""
    num_kv_heads: int
    head_size: int
    dtype: str
    max_position: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.dtype]

    @classmethod
    def of(cls, config: Any, dtype: str | None = None) -> "ModelShape":
        """Read a Hugging Face configuration.

        Raises:
            ValueError: a KV cache cannot have the dtype.
        """
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        name = dtype or str(text.dtype or "bfloat16").removeprefix("torch.")
        if name not in DTYPE_BYTES:
            valid = ", ".join(DTYPE_BYTES)
            raise ValueError(f"dtype is '{name}': valid is one of {valid}")
        return cls(
            num_layers=num_full_attention_layers(text),
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_size=head_size,
            dtype=name,
            max_position=text.max_position_embeddings,
        )
