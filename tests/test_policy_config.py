"""What users type becomes a policy, or an error that names what is wrong."""

import json
from pathlib import Path

import pytest
import yaml

from pyramid_vllm.policy import (
    SCORERS,
    KVPolicyError,
    PolicyConfig,
    preset_names,
    resolve_policy,
)


def test_presets_are_the_documented_ones() -> None:
    assert preset_names() == ["none", "pyramid", "streaming", "uniform"]


@pytest.mark.parametrize("name", [n for n in preset_names() if n != "none"])
def test_every_preset_is_valid_and_named_after_its_file(name: str) -> None:
    policy = resolve_policy(name)
    assert policy is not None
    assert policy.name == name


@pytest.mark.parametrize("policy", [None, "none", {"name": "none"}])
def test_none_switches_the_plugin_off(policy: object) -> None:
    assert resolve_policy(policy) is None  # type: ignore[arg-type]


def test_a_file_a_mapping_and_json_say_the_same(policy_file: Path) -> None:
    settings = {"base": "uniform", "name": "mine", "retention": 0.3, "tiers": 3}
    policy_file.write_text(yaml.safe_dump(settings))
    expected = resolve_policy(settings)
    assert resolve_policy(str(policy_file)) == expected
    assert resolve_policy(json.dumps(settings)) == expected
    assert expected is not None
    assert (expected.name, expected.retention, expected.tiers) == ("mine", 0.3, 3)
    assert expected.steepness == 0.0, "what is not given comes from the base"


def test_overrides_replace_settings() -> None:
    policy = resolve_policy("pyramid", '{"retention": 0.7, "tiers": "layers"}')
    assert policy is not None
    assert (policy.retention, policy.tiers, policy.name) == (0.7, "layers", "pyramid")


def test_a_policy_survives_the_way_to_another_process() -> None:
    policy = resolve_policy("streaming", {"recent": 17})
    assert policy is not None
    assert resolve_policy(policy.model_dump()) == policy


@pytest.mark.parametrize(
    ("policy", "overrides", "words"),
    [
        ("pyramyd", None, ["'pyramyd'", "none, pyramid, streaming, uniform"]),
        ("/no/such/file.yaml", None, ["/no/such/file.yaml", "No such file"]),
        ("{not json", None, ["{not json", "not JSON"]),
        ("pyramid", "[1]", ["kv_policy_config", "JSON object"]),
        ("pyramid", {"retention": 0}, ["'retention' is 0", "greater than 0"]),
        ("pyramid", {"retention": 1.5}, ["'retention' is 1.5", "less than or equal"]),
        ("pyramid", {"retention": -0.1}, ["'retention' is -0.1", "greater than 0"]),
        ("pyramid", {"tiers": 0}, ["'tiers' is 0", "greater than 0"]),
        ("pyramid", {"shape": "cube"}, ["'shape' is 'cube'", "'cosine' or 'linear'"]),
        ("pyramid", {"evict": "never"}, ["'evict' is 'never'", "'prompt_end'"]),
        ("pyramid", {"selection": "token"}, ["'selection' is 'token'", "'layer'"]),
        ("pyramid", {"scorer": "magic"}, ["'scorer' is 'magic'", "attention, recency"]),
        ("pyramid", {"recent": 0}, ["'recent' is 0", "greater than or equal to 1"]),
        ("pyramid", {"retain": 0.5}, ["unknown setting 'retain'", "retention"]),
        ("pyramid", {"recent_ratio": 0.6}, ["recent_ratio=0.6", "retention=0.5"]),
        ({"base": "pyramyd"}, None, ["base is 'pyramyd'", "pyramid"]),
        (None, {"retention": 0.5}, ["kv_policy_config", "valid policies"]),
        ("none", {"retention": 0.5}, ["kv_policy_config", "valid policies"]),
    ],
)
def test_bad_settings_are_named(
    policy: object, overrides: object, words: list[str]
) -> None:
    with pytest.raises(KVPolicyError) as error:
        resolve_policy(policy, overrides)  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("content", "word"),
    [("retention: [", "is not YAML"), ("- retention", "holds list")],
)
def test_bad_yaml_is_named(policy_file: Path, content: str, word: str) -> None:
    policy_file.write_text(content)
    with pytest.raises(KVPolicyError, match=word) as error:
        resolve_policy(str(policy_file))
    assert str(policy_file) in str(error.value)


def test_every_scorer_name_has_a_scorer() -> None:
    from pyramid_vllm.worker.scorers import SCORERS as IMPLEMENTED

    assert set(IMPLEMENTED) == set(SCORERS)


def test_a_policy_is_frozen() -> None:
    policy = PolicyConfig(name="x")
    with pytest.raises(ValueError, match="frozen"):
        policy.retention = 0.1  # type: ignore[misc]
