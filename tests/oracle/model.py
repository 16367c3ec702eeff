"""Weights and arithmetic of a Llama, Qwen2 or Qwen3 decoder, in float64."""

from typing import Any

import torch

F64 = torch.float64


class DenseModel:
    """A Hugging Face decoder's weights.

    Args:
        folder: a model that transformers saved.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        head_size = getattr(config, "head_dim", None)
        self.head_size: int = head_size or config.hidden_size // self.num_heads
        self.epsilon: float = config.rms_norm_eps
        parameters = getattr(config, "rope_parameters", None) or {}
        self.theta = float(parameters.get("rope_theta", 10_000.0))
        assert parameters.get("rope_type", "default") == "default"
        self._weights = {
            name: tensor.to(F64) for name, tensor in model.state_dict().items()
        }

    def _weight(self, name: str) -> torch.Tensor | None:
        return self._weights.get(name)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self._weights[f"{name}.weight"].T
        bias = self._weight(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return x * scale * self._weights[f"{name}.weight"]

    def embed(self, tokens: list[int]) -> torch.Tensor:
        """``[num_tokens, hidden]``"""
        return self._weights["model.embed_tokens.weight"][torch.tensor(tokens)]

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.head_size // 2
        frequency = self.theta ** (-torch.arange(half, dtype=F64) / half)
        angle = positions.to(F64)[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def qkv(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of rows: ``[num_rows, heads, head_size]`` each."""
        name = f"model.layers.{layer}"
        x = self._norm(f"{name}.input_layernorm", x)
        parts = []
        for kind in ("q", "k", "v"):
            part = self._linear(f"{name}.self_attn.{kind}_proj", x)
            part = part.view(len(x), -1, self.head_size)
            if f"{name}.self_attn.{kind}_norm.weight" in self._weights:
                part = self._norm(f"{name}.self_attn.{kind}_norm", part)
            parts.append(part if kind == "v" else self._rotate(part, positions))
        return parts[0], parts[1], parts[2]

    def finish_layer(
        self, layer: int, x: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        """A layer's rows after its attention, given the attention's output."""
        name = f"model.layers.{layer}"
        x = x + self._linear(f"{name}.self_attn.o_proj", attended.reshape(len(x), -1))
        y = self._norm(f"{name}.post_attention_layernorm", x)
        gate = torch.nn.functional.silu(self._linear(f"{name}.mlp.gate_proj", y))
        up = self._linear(f"{name}.mlp.up_proj", y)
        return x + self._linear(f"{name}.mlp.down_proj", gate * up)

    def logprobs(self, x: torch.Tensor) -> torch.Tensor:
        """``[num_rows, vocabulary]``"""
        head = self._weight("lm_head.weight")
        if head is None:
            head = self._weights["model.embed_tokens.weight"]
        return torch.log_softmax(self._norm("model.norm", x) @ head.T, dim=-1)
