"""A transformers model whose layers keep chosen tokens, one sequence at a time.

Slower than an engine, but it tries many policies on one prefill: what layers keep is
a mask away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.policy import LengthRule
from pyramid_vllm.tools.analysis.choice import LayerCache, Pruning, choose, gathered

_ATTENTION = "pyramid_vllm_dense"


@dataclass
class Prefill:
    """A prompt's caches, and the logits after it."""

    prompt: Sequence[int]
    layers: list[LayerCache]
    logits: torch.Tensor
    """``[vocab_size]``, those that predict the first new token."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)


@dataclass
class _Pass:
    """One forward pass, as the attention of each layer sees it."""

    past: list[LayerCache] | None = None
    num_queries: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)
    prune: Pruning | None = None


_current = _Pass()


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of the new tokens, and to what the layer kept of older ones.

    Shapes as transformers has them: ``[1, heads, tokens, head_size]``; the output is
    ``[1, tokens, heads, head_size]``.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if _current.past is None:
        newest = query[0, :, -_current.num_queries :].transpose(0, 1)
        cache = LayerCache(key[0], value[0], newest.clone(), scale)
        _current.layers[layer] = cache
        if _current.prune is not None:
            _current.prune.after(layer, cache)
        mask = None
    else:
        past = _current.past[layer]
        num_new, num_past = query.shape[2], past.key.shape[1]
        key = torch.cat((past.key[None], key), dim=2)
        value = torch.cat((past.value[None], value), dim=2)
        mask = torch.ones(num_new, num_past + num_new, dtype=torch.bool).tril(num_past)
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return output.transpose(1, 2), None


class DenseModel:
    """A causal language model of transformers, in float32.

    Args:
        folder: the model's folder or name.

    Raises:
        ValueError: some of its layers have no full attention.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder).get_text_config()
        if num_full_attention_layers(config) != config.num_hidden_layers:
            raise ValueError(
                f"model is '{folder}': valid are models whose layers all have full "
                "attention"
            )
        AttentionInterface.register(_ATTENTION, _attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=_ATTENTION
        ).eval()
        self._layers = self.model.get_decoder().layers

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    def _forward(self, run: _Pass, start: int, count: int, **inputs: Any) -> Any:
        global _current
        _current = run
        positions = torch.arange(start, start + count)[None]
        with torch.inference_mode():
            output = self.model(position_ids=positions, use_cache=False, **inputs)
        return output.logits[0]

    def prefill(
        self, prompt: Sequence[int], num_queries: int, rule: LengthRule | None = None
    ) -> Prefill:
        """Run a prompt in one chunk.

        Args:
            prompt: token ids.
            num_queries: newest tokens whose queries are wanted.
            rule: how rows are pruned; None: every layer computes all of them.
        """
        pruning = Pruning(rule, len(prompt)) if rule else None
        hooks = [
            layer.register_forward_pre_hook(pruning.before, with_kwargs=True)
            for layer in self._layers
            if pruning
        ]
        run = _Pass(num_queries=num_queries, prune=pruning)
        ids = torch.tensor([list(prompt)])
        logits = self._forward(run, 0, len(prompt), input_ids=ids, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        layers = [run.layers[layer] for layer in range(self.num_layers)]
        return Prefill(prompt, layers, logits[-1])

    def kept(self, full: Prefill, rule: LengthRule) -> Prefill:
        """The cache of a prompt after a policy's rule has evicted tokens."""
        prefill = full
        if rule.prunes:
            prefill = self.prefill(full.prompt, len(full.layers[0].query), rule)
        counts = rule.cache_lengths(full.num_tokens)
        layers = []
        for tier, cache in zip(rule.layout.tier_of_layer, prefill.layers, strict=True):
            count = counts[tier]
            if count < cache.key.shape[1]:
                chosen = choose(cache, rule.config, rule, count, full.num_tokens)
                cache = gathered(cache, chosen)
            layers.append(cache)
        return replace(prefill, layers=layers)

    def continued(self, prefill: Prefill, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the tokens after a prompt, each given those before.

        Returns:
            ``[len(tokens), vocab_size]``, float32; row ``i`` predicts ``tokens[i]``.
        """
        rows = [prefill.logits[None]]
        if len(tokens) > 1:
            run = _Pass(past=prefill.layers)
            ids = torch.tensor([list(tokens[:-1])])
            start = prefill.num_tokens
            rows.append(self._forward(run, start, len(tokens) - 1, input_ids=ids))
        return torch.log_softmax(torch.cat(rows).float(), dim=-1)
