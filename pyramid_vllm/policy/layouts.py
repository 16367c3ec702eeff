"""Cuts a model's layers into tiers, by what the policy lets each of them keep."""

from collections.abc import Sequence
from itertools import groupby

from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.errors import KVPolicyError
from pyramid_vllm.policy.lengths import LengthRule
from pyramid_vllm.policy.tiers import TierLayout

_AUTO_TIERS = range(4, 9)
#: Most tiers first: they follow the weights more closely. Each tier costs time.
_AUTO_TIERS_BY_WEIGHT = range(6, 3, -1)
#: Most KV cache groups of tiers with equal shares: each costs time in every step.
_MAX_GROUPS = 8
#: Prompt lengths at which layers are compared.
_SAMPLES = (1, 100, 1_000, 4_096, 100_000)


def tier_layout(config: PolicyConfig, num_layers: int) -> TierLayout:
    """Cut a model's full-attention layers into the policy's tiers.

    ``tiers: auto`` makes one tier of all layers that keep equally much, if that gives
    few KV cache groups; else as many tiers as waste the least memory.

    Raises:
        KVPolicyError: the model has no full-attention layer, or fewer layers than
            ``tiers``.
    """
    if num_layers < 1:
        raise KVPolicyError(
            f"kv_policy '{config.name}' needs layers with full attention: "
            "this model has none"
        )
    order = _order(config, num_layers)
    if config.tiers == "layers":
        return TierLayout(num_layers, num_layers, order)
    if config.tiers == "auto":
        # Rows are pruned between tiers: pruning needs several, whatever their shares.
        by_share = None
        if config.prune_from is None:
            by_share = _by_share(config, order, num_layers)
        return by_share or _even(order, num_layers)
    if config.tiers > num_layers:
        raise KVPolicyError(
            f"KV policy '{config.name}': setting 'tiers' is {config.tiers}: valid is "
            f"1 to {num_layers}, the model's full-attention layers, 'auto' or 'layers'"
        )
    return TierLayout(num_layers, config.tiers, order)


def _by_share(
    config: PolicyConfig, order: tuple[int, ...] | None, num_layers: int
) -> TierLayout | None:
    """One tier for each share; None: there are too many, or their sizes do not fit."""
    rule = LengthRule(config, TierLayout(num_layers, num_layers))
    counts = [rule.cache_lengths(n) for n in _SAMPLES] + [rule.group_kept]
    # A run of layers that keep equally much: in the order in which they are cut.
    layers = range(num_layers) if order is None else order
    runs = groupby(layers, key=lambda layer: [of_all[layer] for of_all in counts])
    sizes = tuple(len(list(run)) for _, run in runs)
    layout = TierLayout(num_layers, len(sizes), order, sizes)
    fits = layout.num_padding_layers <= _even(order, num_layers).num_padding_layers
    return layout if fits and sum(layout.groups_per_tier) <= _MAX_GROUPS else None


def _even(order: Sequence[int] | None, num_layers: int) -> TierLayout:
    """Tiers of like sizes, in the number that wastes the least memory."""
    tried = _AUTO_TIERS if order is None else _AUTO_TIERS_BY_WEIGHT
    cut = None if order is None else tuple(order)
    layouts = [
        TierLayout(num_layers, tiers, cut) for tiers in tried if tiers <= num_layers
    ]
    if not layouts:
        return TierLayout(num_layers, num_layers, cut)
    return min(layouts, key=lambda layout: layout.num_padding_layers)


def _order(config: PolicyConfig, num_layers: int) -> tuple[int, ...] | None:
    """Layers by falling weight, so that a tier's layers have similar weights."""
    weights = config.given_weights
    if weights is None:
        return None
    if len(weights) != num_layers:
        raise KVPolicyError(
            f"KV policy '{config.name}': setting 'layer_weights' has {len(weights)} "
            f"numbers: valid is one for each of the model's {num_layers} layers with "
            "full attention"
        )
    if config.prune_from is not None:
        return None  # all deeper layers lack the rows that a tier drops
    return tuple(sorted(range(num_layers), key=lambda layer: -weights[layer]))
