"""Results of an inspection, read by the table and the page: they are ``inspect.json``.

- ``model``, ``policy``: its settings, as they are for the model;
- ``tokens``: each with ``id`` and ``text``; ``num_prompt`` of them are the prompt, and
  ``num_computed`` have a key and a value: not the last one;
- ``num_kv_heads``, ``block_size``, ``layer_page_bytes``: of a page in one layer;
- ``sinks``, ``recent``: first and newest tokens of the prompt that are always kept;
- ``stock_kv_bytes``: what stock vLLM holds for the request in the same layers;
- ``layers``: those with full attention, from 0; ``positions``, ascending, that any of
  its KV heads keeps, and for each of them how many ``heads`` keep it;
- ``tiers``: their ``layers``; ``num_held`` tokens in the cache of a KV head,
  ``num_prompt_held`` of the prompt among them; ``pages`` of each layer; ``kv_bytes`` of
  all of its layers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pyramid_vllm.policy import LengthRule, num_pages

Inspection = dict[str, Any]


def inspection_of(
    request: Mapping[str, Any], rule: LengthRule, held: Sequence[Sequence[list[int]]]
) -> Inspection:
    """Put together what is shown.

    Args:
        request: what was run: model, tokens, and numbers that do not depend on a rule.
        rule: the policy's counts.
        held: by layer and KV head, positions in the cache.

    Raises:
        RuntimeError: the layers hold other counts than the rule says.
    """
    num_prompt, num_computed = request["num_prompt"], len(request["tokens"]) - 1
    page_bytes = request["layer_page_bytes"]
    counts = rule.held_lengths(num_prompt, num_computed)
    *pages, stock_pages = num_pages((*counts, num_computed), request["block_size"])
    tiers = [
        {
            "tier": tier,
            "layers": list(layers),
            "num_held": counts[tier],
            "num_prompt_held": sum(p < num_prompt for p in held[layers[0]][0]),
            "pages": pages[tier],
            "kv_bytes": pages[tier] * page_bytes * len(layers),
        }
        for tier, layers in enumerate(rule.layout.layers)
    ]
    return {
        **request,
        "policy": rule.config.model_dump(mode="json"),
        "num_computed": num_computed,
        "sinks": min(rule.config.sinks, num_prompt),
        "recent": min(rule.num_recent(num_prompt), num_prompt),
        "stock_kv_bytes": stock_pages * page_bytes * len(held),
        "tiers": tiers,
        "layers": [
            _layer(layer, tier, counts[tier], heads)
            for layer, tier, heads in zip(
                range(len(held)), rule.layout.tier_of_layer, held, strict=True
            )
        ],
    }


def _layer(
    layer: int, tier: int, count: int, heads: Sequence[list[int]]
) -> dict[str, Any]:
    lengths = [*map(len, heads)]
    if set(lengths) != {count}:
        raise RuntimeError(
            f"layer {layer} holds {lengths} tokens by KV head, its policy says {count}"
        )
    kept = sorted(Counter(position for head in heads for position in head).items())
    positions, numbers = map(list, zip(*kept, strict=True))
    return {"layer": layer, "tier": tier, "positions": positions, "heads": numbers}
