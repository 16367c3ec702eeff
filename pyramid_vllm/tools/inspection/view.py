"""What is found: the one source of the JSON, the tables, the picture and the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyramid_vllm.policy import LengthRule, num_pages

#: Of one layer, by KV head: positions in the cache, in its order.
Held = Sequence[Sequence[int]]


@dataclass(frozen=True)
class TokenView:
    """A token of the prompt or the output."""

    id: int
    text: str


@dataclass(frozen=True)
class LayerView:
    """What one layer holds."""

    layer: int
    """Among the layers with full attention, from 0."""
    tier: int
    positions: tuple[int, ...]
    """Ascending: those that any of its KV heads keeps."""
    heads: tuple[int, ...]
    """For each of them, how many of the KV heads keep it."""


@dataclass(frozen=True)
class TierView:
    """What each layer of a tier holds."""

    tier: int
    layers: tuple[int, ...]
    num_held: int
    """Tokens in the cache, a KV head."""
    num_prompt_held: int
    """Of these, tokens of the prompt."""
    pages: int
    """Pages of each layer."""
    kv_bytes: int
    """Of all its layers' pages."""


@dataclass(frozen=True)
class Inspection:
    """One request after its last step."""

    model: str
    policy: dict[str, Any]
    """The policy's settings, as they are for the model."""
    num_prompt: int
    """Tokens of the prompt; those behind were generated."""
    num_computed: int
    """Tokens that have a key and a value: not the last one generated."""
    num_kv_heads: int
    block_size: int
    sinks: int
    """First tokens of the prompt that are always kept."""
    recent: int
    """Newest tokens of the prompt that always are."""
    stock_kv_bytes: int
    """What stock vLLM holds of the request, in the same layers."""
    tokens: tuple[TokenView, ...]
    tiers: tuple[TierView, ...]
    layers: tuple[LayerView, ...]

    @property
    def kv_bytes(self) -> int:
        """Of all tiers."""
        return sum(tier.kv_bytes for tier in self.tiers)

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """What was run, before what was kept is known."""

    model: str
    tokens: tuple[TokenView, ...]
    num_prompt: int
    num_kv_heads: int
    block_size: int
    layer_page_bytes: int
    """Of one layer's page."""

    @property
    def num_computed(self) -> int:
        """All but the last token, which no step has read yet."""
        return len(self.tokens) - 1


def inspection_of(
    request: Request,
    rule: LengthRule,
    held: Sequence[Held],
) -> Inspection:
    """Put together what is shown.

    Args:
        request: what was run.
        rule: the policy's counts.
        held: by layer.

    Raises:
        RuntimeError: the layers hold other counts than the rule says.
    """
    _check_counts(request, rule, held)
    tiers = rule.layout.tier_of_layer
    views = tuple(
        _layer(layer, tiers[layer], heads) for layer, heads in enumerate(held)
    )
    return Inspection(
        model=request.model,
        policy=rule.config.model_dump(mode="json"),
        num_prompt=request.num_prompt,
        num_computed=request.num_computed,
        num_kv_heads=request.num_kv_heads,
        block_size=request.block_size,
        sinks=min(rule.config.sinks, request.num_prompt),
        recent=min(rule.num_recent(request.num_prompt), request.num_prompt),
        stock_kv_bytes=_bytes(request, request.num_computed, len(held)),
        tokens=request.tokens,
        tiers=_tiers(request, rule, held),
        layers=views,
    )


def _check_counts(request: Request, rule: LengthRule, held: Sequence[Held]) -> None:
    counts = rule.held_lengths(request.num_prompt, request.num_computed)
    expected = [counts[tier] for tier in rule.layout.tier_of_layer]
    for layer, (heads, count) in enumerate(zip(held, expected, strict=True)):
        if len(heads) != request.num_kv_heads or {*map(len, heads)} != {count}:
            raise RuntimeError(
                f"layer {layer} holds {[*map(len, heads)]} tokens by KV head, its "
                f"policy says {count} in each of {request.num_kv_heads}"
            )


def _layer(layer: int, tier: int, heads: Held) -> LayerView:
    counts = Counter(position for head in heads for position in head)
    positions = tuple(sorted(counts))
    return LayerView(layer, tier, positions, tuple(counts[p] for p in positions))


def _tiers(
    request: Request, rule: LengthRule, held: Sequence[Held]
) -> tuple[TierView, ...]:
    views = []
    for tier, layers in enumerate(rule.layout.layers):
        head = held[layers[0]][0]
        (pages,) = num_pages((len(head),), request.block_size)
        views.append(
            TierView(
                tier=tier,
                layers=layers,
                num_held=len(head),
                num_prompt_held=sum(p < request.num_prompt for p in head),
                pages=pages,
                kv_bytes=_bytes(request, len(head), len(layers)),
            )
        )
    return tuple(views)


def _bytes(request: Request, num_tokens: int, num_layers: int) -> int:
    (pages,) = num_pages((num_tokens,), request.block_size)
    return pages * request.layer_page_bytes * num_layers
