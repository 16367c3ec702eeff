"""Measured layer weights of known models, for ``layer_weights: auto``."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.presets import config_dir

Weights = tuple[float, ...]

#: Settings of a model's text configuration that identify its profile, also for
#: fine-tuned models.
IDENTITY = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@lru_cache(maxsize=1)
def _profiles() -> tuple[Mapping[str, Any], ...]:
    return tuple(_read(path) for path in sorted(config_dir("profiles").glob("*.yaml")))


def _read(path: Path) -> Mapping[str, Any]:
    profile: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return profile


def profile_weights(text_config: Any) -> Weights | None:
    """The measured weights of a model.

    Args:
        text_config: a Hugging Face text configuration.

    Returns:
        One number for each full-attention layer; None: the model has no profile.
    """
    identity = {name: getattr(text_config, name, None) for name in IDENTITY}
    for profile in _profiles():
        if profile["model"] == identity:
            return tuple(profile["layer_weights"])
    return None


def fitted(policy: PolicyConfig, weights: Weights | None) -> PolicyConfig:
    """The policy for one model: ``layer_weights: auto`` replaced by the model's.

    Args:
        policy: as configured.
        weights: from ``profile_weights``. ``shape`` and ``steepness`` apply if this is
            None, if the budget reads no weights, or if prompts are pruned, because
            pruned tiers follow depth.
    """
    if policy.layer_weights != "auto":
        return policy
    reads = policy.budget == "retention" and policy.prune_from is None
    return policy.model_copy(update={"layer_weights": weights if reads else None})
