"""The engines that are compared: stock vLLM and policies."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyramid_vllm.policy import NONE, LengthRule, PolicyConfig, resolve_policy


@dataclass(frozen=True)
class Side:
    """One of the engines that are compared."""

    name: str
    policy: PolicyConfig | None

    @property
    def policy_json(self) -> str | None:
        """JSON, the form that engines take; None: stock vLLM."""
        return None if self.policy is None else json.dumps(self.policy.model_dump())


def parse_sides(policies: Sequence[str], overrides: str | None = None) -> list[Side]:
    """Stock vLLM and the policies, each under a name of its own; one that is there
    already is left out.

    Raises:
        KVPolicyError: a policy is not valid.
    """
    sides = [Side(NONE, None)]
    for text in policies:
        policy = None if text == NONE else resolve_policy(text, overrides)
        if policy is None or any(side.policy == policy for side in sides):
            continue
        names = [side.policy.name for side in sides if side.policy]
        alike = names.count(policy.name)
        name = f"{policy.name} ({alike + 1})" if alike else policy.name
        sides.append(Side(name, policy))
    return sides


def should_evict(rule: LengthRule | None, lengths: Iterable[int]) -> bool:
    """Whether a side keeps less than all of any prompt; no rule: stock vLLM."""
    return rule is not None and any(
        min(rule.cache_lengths(length)) < length for length in set(lengths)
    )
