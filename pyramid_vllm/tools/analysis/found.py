"""The results of an analysis, and the policy that they suggest."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyramid_vllm.policy import (
    LengthRule,
    PolicyConfig,
    fitted,
    profile_weights,
    tier_layout,
)
from pyramid_vllm.policy.config import validated
from pyramid_vllm.tools.analysis.settings import AnalyzeSettings
from pyramid_vllm.tools.analysis.suggest import layer_shares, not_rising

#: The least share that a suggestion leaves to a layer.
_LEAST = 0.15


@dataclass
class Found:
    """Results of the analysis."""

    settings: AnalyzeSettings
    model: Any
    """The model's configuration."""
    policy: PolicyConfig
    """At the suggestion's retention."""
    text_costs: list[np.ndarray] = field(default_factory=list)
    """Loss and divergence of each window, ``[num_ratios, num_layers, 2]``."""
    needle_costs: list[np.ndarray] = field(default_factory=list)
    """The same for the answers of needles that the full cache finds."""
    trial: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Costs on each window that the suggestion was not made from, by policy."""

    @property
    def costs(self) -> np.ndarray:
        """``[num_ratios, num_layers, 2]``: the mean over text and needles."""
        kinds = [
            np.mean(kind, axis=0)
            for kind in (self.text_costs, self.needle_costs)
            if kind
        ]
        mean: np.ndarray = np.mean(kinds, axis=0)
        return mean

    @property
    def rule(self) -> LengthRule:
        """The policy's counts on this model."""
        layers = self.model.num_hidden_layers
        return LengthRule(self.policy, tier_layout(self.policy, layers))

    @property
    def shares(self) -> list[float]:
        """What each layer should keep, as a share of its context: layers of a tier
        keep equally much."""
        falling = self.settings.falling or self.policy.prune_from is not None
        retention = self.policy.retention
        asked = (self.settings.ratios, self.costs[..., 1], retention, _LEAST)
        shares = layer_shares(*asked)
        if falling:
            return [round(share, 4) for share in not_rising(shares)]
        apart = suggestion(self.policy, shares)
        tiers = tier_layout(apart, len(shares)).layers
        return [round(share, 4) for share in layer_shares(*asked, tiers)]

    @property
    def suggested(self) -> PolicyConfig:
        """The policy with these shares."""
        return suggestion(self.policy, self.shares)

    def compared(self) -> list[PolicyConfig]:
        """The suggestion, the policy as it is, and as it is for unknown models."""
        known = fitted(self.policy, profile_weights(self.model))
        flat = {"layer_weights": None, "name": f"{self.policy.name}, no profile"}
        weighted = [known] if known.given_weights else []
        return [self.suggested, *weighted, self.policy.model_copy(update=flat)]


def suggestion(policy: PolicyConfig, weights: Sequence[float] | None) -> PolicyConfig:
    """The policy with weights of layers."""
    changes = {
        "name": f"{policy.name}-suggested",
        "budget": "retention",
        "layer_weights": weights,
        # One tier has one count, whatever the weights.
        "tiers": "auto" if policy.tiers == 1 else policy.tiers,
        "capacity": None,
    }
    return validated(policy.model_dump() | changes, "suggested")
