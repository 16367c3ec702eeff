"""Tiny random models."""

from pathlib import Path
from typing import Any

TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    # Larger than usual, so that attention is far from uniform.
    "initializer_range": 0.2,
}


def save_tiny_llama(folder: Path, settings: dict[str, Any]) -> str:
    """Write a random Llama; its folder has no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).float().save_pretrained(folder)
    return str(folder)


def save_config(folder: Path, config: Any) -> str:
    """Write a configuration alone: enough for all that comes before the weights."""
    config.save_pretrained(folder)
    return str(folder)
