"""A transformers model whose layers keep chosen tokens, one sequence at a time.

Slower than an engine, but it tries many policies on one prefill: what layers keep is
a mask away. Its choices are those of the worker: the same rule, scores and selection.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pyramid_vllm.kernels import select_tokens
from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.policy import LengthRule, PolicyConfig, Queries
from pyramid_vllm.worker import scorers

_ATTENTION = "pyramid_vllm_dense"


@dataclass
class LayerCache:
    """What one layer holds of a sequence."""

    key: torch.Tensor
    """``[num_kv_heads, num_tokens, head_size]``, rotated."""
    value: torch.Tensor
    """The same shape."""
    query: torch.Tensor
    """``[num_queries, num_heads, head_size]``, of the newest tokens."""
    scale: float


@dataclass
class Prefill:
    """A prompt's caches, and the logits behind it."""

    num_tokens: int
    layers: list[LayerCache]
    logits: torch.Tensor
    """``[vocab_size]``, those that predict the first new token."""
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer: its input, ``[1, num_tokens, hidden_size]``."""


@dataclass
class _Pass:
    """One forward pass, as the attention of each layer sees it."""

    past: list[LayerCache] | None = None
    num_queries: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)
    prune: "_Pruning | None" = None


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
    """Causal attention of the new tokens, behind what the layer kept of older ones.

    Shapes as transformers has them: ``[1, heads, tokens, head_size]``; the output is
    ``[1, tokens, heads, head_size]``.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if _current.past is None:
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        newest = query[0, :, -_current.num_queries :].transpose(0, 1)
        cache = LayerCache(key[0], value[0], newest.clone(), scale)
        _current.layers[layer] = cache
        if _current.prune is not None:
            _current.prune.after(layer, cache)
        return output.transpose(1, 2), None
    past = _current.past[layer]
    num_new, num_past = query.shape[2], past.key.shape[1]
    mask = torch.ones(num_new, num_past + num_new, dtype=torch.bool).tril(num_past)
    output = functional.scaled_dot_product_attention(
        query,
        torch.cat((past.key[None], key), dim=2),
        torch.cat((past.value[None], value), dim=2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return output.transpose(1, 2), None


def choose(
    cache: LayerCache, config: PolicyConfig, rule: LengthRule, num_kept: int, end: int
) -> torch.Tensor:
    """Tokens of a layer that stay: ``[num_kv_heads or 1, num_kept]``, ascending.

    Args:
        cache: the layer's, of the whole prompt.
        config: how to choose.
        rule: how long windows are.
        num_kept: how many stay.
        end: length of the prompt.
    """
    num_recent = rule.num_recent(end)
    scores = layer_scores(cache, config, num_queries_read(rule, end), num_recent)
    if config.selection == "layer":
        scores = scores.mean(dim=0, keepdim=True)
    return select_tokens(scores, num_kept, config.sinks, num_recent)


def num_queries_read(rule: LengthRule, num_tokens: int) -> int:
    """Newest of a whole prompt's queries that the rule's scorer reads."""
    if rule.config.scored_queries is Queries.ALL:
        return num_tokens
    return rule.num_queries(num_tokens)


def layer_scores(
    cache: LayerCache, config: PolicyConfig, num_queries: int, num_recent: int
) -> torch.Tensor:
    """A layer's scores: ``[num_kv_heads or 1, num_tokens]``."""
    inputs = scorers.ScoreInputs(
        query=cache.query[-num_queries:] if num_queries else None,
        key=cache.key.transpose(0, 1),
        scale=cache.scale,
        logits_soft_cap=0.0,
        sink_logits=None,
        num_recent=num_recent,
    )
    return scorers.layer_scores(inputs, config)


def gathered(cache: LayerCache, kept: torch.Tensor) -> LayerCache:
    """The kept tokens alone."""
    heads, _, size = cache.key.shape
    index = kept.expand(heads, -1)[..., None].expand(-1, -1, size)
    key, value = cache.key.gather(1, index), cache.value.gather(1, index)
    return LayerCache(key, value, cache.query, cache.scale)


def layer_before_pruning(rule: LengthRule) -> int:
    """The last layer that computes all rows."""
    return sum(rule.layout.sizes[: rule.first_pruned_tier]) - 1


class _Pruning:
    """Rows that layers compute, narrowed from tier to tier."""

    def __init__(self, rule: LengthRule, num_tokens: int) -> None:
        self._rule, self._num_tokens = rule, num_tokens
        self._rows = rule.num_rows(0, num_tokens)
        self._tiers = rule.layout.tier_of_layer
        self._next: torch.Tensor | None = None

    def after(self, layer: int, cache: LayerCache) -> None:
        """Choose the next tier's rows, at a tier's end."""
        tier = self._tiers[layer]
        last = layer + 1 == len(self._tiers) or self._tiers[layer + 1] != tier
        if not last or tier + 1 == self._rule.layout.num_tiers:
            return
        if self._rows[tier + 1] < cache.key.shape[1]:
            config = self._rule.config.model_copy(update={"selection": "layer"})
            self._next = choose(
                cache, config, self._rule, self._rows[tier + 1], self._num_tokens
            )[0]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook of a layer: drop the rows that it is not to compute."""
        rows, self._next = self._next, None
        if rows is not None:
            self._left = rows if self._left is None else self._left[rows]
        if self._left is None:
            return args, kwargs
        values = dict(kwargs)
        if rows is not None:
            args = (args[0][:, rows], *args[1:])
        cos, sin = values["position_embeddings"]
        values["position_embeddings"] = (cos[:, self._left], sin[:, self._left])
        return args, values

    _left: torch.Tensor | None = None


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
        self._stack = self.model.get_decoder()
        self._layers = self._stack.layers

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    @contextmanager
    def _from_layer(self, first: int) -> Iterator[None]:
        """Let the model start with a later layer."""
        self._stack.layers = self._layers[first:]
        self.model.config.num_hidden_layers = self.num_layers - first
        try:
            yield
        finally:
            self._stack.layers = self._layers
            self.model.config.num_hidden_layers = self.num_layers

    def _forward(self, run: _Pass, start: int, count: int, **inputs: Any) -> Any:
        global _current
        _current = run
        positions = torch.arange(start, start + count)[None]
        with torch.inference_mode():
            return self.model(position_ids=positions, use_cache=False, **inputs).logits[
                0
            ]

    def prefill(
        self, prompt: Sequence[int], num_queries: int, keep_hidden: Sequence[int] = ()
    ) -> Prefill:
        """Run a prompt with the full cache.

        Args:
            prompt: token ids.
            num_queries: newest tokens whose queries are wanted.
            keep_hidden: layers whose inputs are wanted, to start from them again.
        """
        hidden: dict[int, torch.Tensor] = {}
        hooks = [
            self._layers[layer].register_forward_pre_hook(
                lambda module, args, layer=layer: hidden.update({layer: args[0]})
            )
            for layer in keep_hidden
        ]
        run = _Pass(num_queries=num_queries)
        ids = torch.tensor([list(prompt)])
        logits = self._forward(run, 0, len(prompt), input_ids=ids, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        layers = [run.layers[layer] for layer in range(self.num_layers)]
        return Prefill(len(prompt), layers, logits[-1], hidden)

    def pruned(self, full: Prefill, rule: LengthRule) -> Prefill:
        """The same prompt, with rows pruned as the rule says, in one chunk.

        ``full`` has to hold the input of the last layer before the first pruned tier.
        """
        first = layer_before_pruning(rule)
        pruning = _Pruning(rule, full.num_tokens)
        hooks = [
            layer.register_forward_pre_hook(pruning.before, with_kwargs=True)
            for layer in self._layers[first:]
        ]
        run = _Pass(num_queries=len(full.layers[0].query), prune=pruning)
        with self._from_layer(first):
            logits = self._forward(
                run,
                0,
                full.num_tokens,
                inputs_embeds=full.hidden[first],
                logits_to_keep=1,
            )
        for hook in hooks:
            hook.remove()
        layers = [
            run.layers.get(layer, full.layers[layer])
            for layer in range(self.num_layers)
        ]
        return Prefill(full.num_tokens, layers, logits[-1])

    def kept(self, full: Prefill, rule: LengthRule) -> Prefill:
        """What is left of a prompt once its tokens are evicted by a policy's rule."""
        prefill = self.pruned(full, rule) if rule.prunes else full
        counts = rule.cache_lengths(full.num_tokens)
        layers = []
        for tier, cache in zip(rule.layout.tier_of_layer, prefill.layers, strict=True):
            count = counts[tier]
            if count < cache.key.shape[1]:
                chosen = choose(cache, rule.config, rule, count, full.num_tokens)
                cache = gathered(cache, chosen)
            layers.append(cache)
        return Prefill(full.num_tokens, layers, prefill.logits)

    def continued(self, prefill: Prefill, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the tokens behind a prompt, each given those before.

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
