"""Budgets by name: how a prompt's kept tokens are divided among layers."""

from pyramid_vllm.policy.budgets.arithmetic import ArithmeticBudget
from pyramid_vllm.policy.budgets.base import Budget
from pyramid_vllm.policy.budgets.pyramidinfer import PyramidInferBudget
from pyramid_vllm.policy.budgets.retention import RetentionBudget
from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.tiers import TierLayout

#: The names are those of ``PolicyConfig.budget``.
BUDGETS: dict[str, type[Budget]] = {
    "retention": RetentionBudget,
    "pyramidinfer": PyramidInferBudget,
    "arithmetic": ArithmeticBudget,
}


def make_budget(config: PolicyConfig, layout: TierLayout) -> Budget:
    """The budget that a policy names, for one model's layers."""
    return BUDGETS[config.budget](config, layout)


__all__ = ["BUDGETS", "Budget", "make_budget"]
