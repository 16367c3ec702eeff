"""Results of an inspection, read by the JSON, the table and the page."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyramid_vllm.policy import LengthRule, num_pages


@dataclass(frozen=True)
class TokenView:
    """A token of the prompt or the output."""

    id: int
    text: str


@dataclass(frozen=True)
class LayerView:
    """The tokens that one layer holds."""

    layer: int
    """Among the layers with full attention, from 0."""
    tier: int
    positions: tuple[int, ...]
    """Ascending: those that any of its KV heads keeps."""
    heads: tuple[int, ...]
    """For each of them, how many of the KV heads keep it."""


@dataclass(frozen=True)
class TierView:
    """Counts of the tokens that each layer of a tier holds."""

    tier: int
    layers: tuple[int, ...]
    num_held: int
    """Tokens in the cache of a KV head."""
    num_prompt_held: int
    """Tokens of the prompt among them."""
    pages: int
    """Pages of each layer."""
    kv_bytes: int
    """Bytes of the pages of all its layers."""


@dataclass(frozen=True)
class Request:
    """The request, before it is known which tokens were kept."""

    model: str
    tokens: tuple[TokenView, ...]
    num_prompt: int
    """Tokens of the prompt; those after them were generated."""
    num_kv_heads: int
    block_size: int
    layer_page_bytes: int
    """Bytes of a page in one layer."""


@dataclass(frozen=True)
class Inspection(Request):
    """One request after its last step."""

    policy: dict[str, Any]
    """The policy's settings, as they are for the model."""
    num_computed: int
    """Tokens that have a key and a value: not the last one generated."""
    sinks: int
    """First tokens of the prompt that are always kept."""
    recent: int
    """Newest tokens of the prompt that are always kept."""
    stock_kv_bytes: int
    """Bytes that stock vLLM holds for the request in the same layers."""
    tiers: tuple[TierView, ...]
    layers: tuple[LayerView, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of all tiers."""
        return sum(tier.kv_bytes for tier in self.tiers)


def inspection_of(
    request: Request, rule: LengthRule, held: Sequence[Sequence[Sequence[int]]]
) -> Inspection:
    """Put together what is shown.

    Args:
        request: what was run.
        rule: the policy's counts.
        held: by layer and KV head, positions in the cache.

    Raises:
        RuntimeError: the layers hold other counts than the rule says.
    """
    num_prompt, num_computed = request.num_prompt, len(request.tokens) - 1
    counts = rule.held_lengths(num_prompt, num_computed)
    layers = []
    for layer, heads in enumerate(held):
        tier = rule.layout.tier_of_layer[layer]
        lengths = [*map(len, heads)]
        if lengths != [counts[tier]] * request.num_kv_heads:
            raise RuntimeError(
                f"layer {layer} holds {lengths} tokens by KV head, its policy says "
                f"{counts[tier]} in each of {request.num_kv_heads}"
            )
        kept = Counter(position for head in heads for position in head)
        positions = tuple(sorted(kept))
        layers.append(
            LayerView(layer, tier, positions, tuple(kept[p] for p in positions))
        )
    all_pages = num_pages((*counts, num_computed), request.block_size)
    tiers = []
    for tier, members in enumerate(rule.layout.layers):
        pages = all_pages[tier]
        num_prompt_held = sum(p < num_prompt for p in held[members[0]][0])
        kv_bytes = pages * request.layer_page_bytes * len(members)
        tiers.append(
            TierView(tier, members, counts[tier], num_prompt_held, pages, kv_bytes)
        )
    return Inspection(
        **vars(request),
        policy=rule.config.model_dump(mode="json"),
        num_computed=num_computed,
        sinks=min(rule.config.sinks, num_prompt),
        recent=min(rule.num_recent(num_prompt), num_prompt),
        stock_kv_bytes=all_pages[-1] * request.layer_page_bytes * len(held),
        tiers=tuple(tiers),
        layers=tuple(layers),
    )
