"""What an evicted cache costs, by policy and by layer, on any model.

PyramidInfer's hypothesis of inference context redundancy (ICR, arXiv 2405.12532,
section 3): deeper layers can do with less context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pyramid_vllm.policy import LengthRule, PolicyConfig, tier_layout
from pyramid_vllm.tools.analysis.choice import choose, gathered, num_queries_read
from pyramid_vllm.tools.analysis.dense import DenseModel, Prefill


@dataclass(frozen=True)
class Cost:
    """What an evicted cache costs, mean over the tokens of a continuation."""

    loss: float
    """Rise of the loss, in nats a token."""
    divergence: float
    """KL of the next-token distribution from the full cache's, in nats."""
    agreement: float
    """Share of tokens whose most likely successor is the full cache's."""


class Continuation:
    """A prompt, its next tokens, and what the full cache makes of them.

    Args:
        model: the model.
        prompt: token ids.
        target: the tokens after it.
        rules: of the policies that will be tried.
    """

    def __init__(
        self,
        model: DenseModel,
        prompt: Sequence[int],
        target: Sequence[int],
        rules: Sequence[LengthRule] = (),
    ) -> None:
        self._model, self._target = model, list(target)
        self._index = torch.tensor(self._target)[:, None]
        num_queries = max([1, *(num_queries_read(rule, len(prompt)) for rule in rules)])
        self.full = model.prefill(prompt, num_queries)
        self._logprobs = model.continued(self.full, self._target)
        self.loss = -float(self._logprobs.gather(1, self._index).mean())

    @property
    def is_certain(self) -> bool:
        """Whether each of the next tokens is the full cache's most likely one."""
        return bool((self._logprobs.argmax(1) == self._index[:, 0]).all())

    def cost(self, prefill: Prefill) -> Cost:
        """The cost of continuing from another cache of the same prompt."""
        ours, full = self._model.continued(prefill, self._target), self._logprobs
        loss = -float(ours.gather(1, self._index).mean())
        return Cost(
            loss=loss - self.loss,
            divergence=float((full.exp() * (full - ours)).sum(dim=1).mean()),
            agreement=float((ours.argmax(1) == full.argmax(1)).float().mean()),
        )

    def policy_cost(self, rule: LengthRule) -> Cost:
        """The cost of a policy."""
        return self.cost(self._model.kept(self.full, rule))

    def layer_costs(self, config: PolicyConfig, ratios: Sequence[float]) -> np.ndarray:
        """ICR: what it costs to cut the context of one layer alone.

        Args:
            config: how the layer chooses its tokens.
            ratios: shares of the context that it keeps.

        Returns:
            ``[num_ratios, num_layers, 2]``: loss and divergence, in nats a token.
        """
        model, full = self._model, self.full
        rule = LengthRule(config, tier_layout(config, model.num_layers))
        least = rule.budget.always(full.num_tokens)
        costs = np.zeros((len(ratios), model.num_layers, 2))
        for layer, cache in enumerate(full.layers):
            for i, ratio in enumerate(ratios):
                num_kept = max(least, int(ratio * full.num_tokens))
                if num_kept == full.num_tokens:
                    continue  # nothing is cut
                chosen = choose(cache, config, rule, num_kept, full.num_tokens)
                layers = list(full.layers)
                layers[layer] = gathered(cache, chosen)
                cost = self.cost(replace(full, layers=layers))
                costs[i, layer] = cost.loss, cost.divergence
        return costs
