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


def save_tiny(folder: Path, family: str, num_layers: int) -> str:
    """Write a random model of a family: ``llama``, ``qwen2`` or ``qwen3``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    settings = TINY_LLAMA | {
        "num_hidden_layers": num_layers,
        "vocab_size": 1024,
        # Attention far from uniform, and rounding far from 1e-3 in the outputs.
        "initializer_range": 0.12,
    }
    if family == "qwen2":  # takes the head's size from the hidden one
        del settings["head_dim"]
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():  # a new model's biases and norms are all alike
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)
