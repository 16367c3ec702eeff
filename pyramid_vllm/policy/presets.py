"""Resolves user input to a ``PolicyConfig``: a name, a file or inline JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pyramid_vllm.policy.config import ALIASES, PolicyConfig, validated
from pyramid_vllm.policy.errors import KVPolicyError

#: The policy that switches the plugin off.
NONE = "none"
_FILE_SUFFIXES = (".yaml", ".yml", ".json")


def config_dir(name: str) -> Path:
    """A folder of shipped files, in the wheel or in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs" / name
    return installed if installed.is_dir() else package.parent / "configs" / name


def preset_dir() -> Path:
    """Folder of the preset files."""
    return config_dir("policies")


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(path.stem for path in preset_dir().glob("*.yaml"))


def resolve_policy(
    policy: str | Mapping[str, Any] | PolicyConfig | None,
    overrides: str | Mapping[str, Any] | None = None,
) -> PolicyConfig | None:
    """Resolve a policy.

    Args:
        policy: a preset's name, the path of a YAML or JSON file, inline JSON, a
            mapping, or None. A mapping starts from the preset that ``base`` or
            ``name`` gives, else from ``pyramid``.
        overrides: settings, as a mapping or as JSON, that replace the policy's.

    Returns:
        The policy; None: the plugin stays off.

    Raises:
        KVPolicyError: the policy is unknown or one of its settings is not valid.
    """
    changes = _mapping(overrides, "kv_policy_config")
    changes = _canonical(changes, "kv_policy_config")
    if policy is None or policy == NONE:
        if changes:
            raise KVPolicyError(
                f"kv_policy_config={changes} needs a kv_policy to change; "
                f"valid policies are {_valid()}"
            )
        return None
    if isinstance(policy, PolicyConfig):
        return validated(_over(policy.model_dump(), changes), f"'{policy.name}'")
    settings, source = _settings(policy)
    settings = _canonical(settings, f"KV policy {source}")
    if settings.get("name") == NONE:
        return resolve_policy(NONE, changes)
    return validated(_over(settings, changes), source)


def with_retention(policy: PolicyConfig, retention: float) -> PolicyConfig:
    """The policy with another retention, which replaces a fixed decay.

    The other settings are not validated again: requests ask for this as they arrive.

    Args:
        policy: a valid one.
        retention: above 0 and at most 1.

    Raises:
        KVPolicyError: the recent window is larger than the retention.
    """
    changes = {"retention": retention, "prefill_decay_ratio": None}
    changed = policy.model_copy(update=changes)
    try:
        changed.check_retention()
    except ValueError as error:
        raise KVPolicyError(f"KV policy '{policy.name}': {error}") from None
    return changed


def _settings(policy: str | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(policy, Mapping):
        return _inherit(dict(policy)), "given inline"
    text = policy.strip()
    if text.startswith("{"):
        return _inherit(_mapping(text, "kv_policy")), "given inline"
    if text.endswith(_FILE_SUFFIXES):
        return _inherit(_read(Path(text).expanduser())), f"in file {text}"
    if text not in preset_names():
        raise KVPolicyError(f"kv_policy is '{policy}': valid policies are {_valid()}")
    return _read(preset_dir() / f"{text}.yaml"), f"'{text}'"


def _inherit(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings on top of their base preset."""
    name = settings.get("name")
    base = settings.pop("base", name if name in preset_names() else "pyramid")
    if base not in preset_names():
        raise KVPolicyError(f"base is '{base}': valid presets are {_valid()}")
    preset = _canonical(_read(preset_dir() / f"{base}.yaml"), f"preset {base}")
    return {"name": "custom", **_over(preset, _canonical(settings, "KV policy"))}


def _canonical(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings with aliases replaced by the names of ``PolicyConfig``."""
    names = [ALIASES.get(name, name) for name in settings]
    for name in names:
        if names.count(name) > 1:
            aliases = [alias for alias, to in ALIASES.items() if to == name]
            raise KVPolicyError(
                f"{source}: '{name}' is given twice, also as {', '.join(aliases)}"
            )
    return dict(zip(names, settings.values(), strict=True))


def _over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with ``changes`` applied."""
    settings = {**base, **changes}
    if "retention" in changes and "prefill_decay_ratio" not in changes:
        # An explicit retention replaces the base's decay, which would hide it.
        settings.pop("prefill_decay_ratio", None)
    if changes.keys() & {"shape", "steepness"} and "layer_weights" not in changes:
        # The base's weights would hide an explicit shape.
        settings.pop("layer_weights", None)
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KVPolicyError(
            f"KV policy file '{path}' cannot be read: {error.strerror}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise KVPolicyError(f"KV policy file '{path}' is not YAML: {detail}") from None
    if not isinstance(content, dict):
        raise KVPolicyError(
            f"KV policy file '{path}' holds {type(content).__name__}: "
            "valid is a mapping of settings"
        )
    return content


def _mapping(value: str | Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise KVPolicyError(f"{key}={value!r} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise KVPolicyError(f"{key}={value!r}: valid is a JSON object of settings")
    return parsed


def _valid() -> str:
    return f"{', '.join(preset_names())}, a YAML file's path, inline JSON"
