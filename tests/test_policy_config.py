"""What users type becomes a policy, or an error that names what is wrong."""

import json
from pathlib import Path

import pytest
import yaml

from pyramid_vllm.policy import (
    KVPolicyError,
    PolicyConfig,
    preset_names,
    resolve_policy,
)


def test_presets_are_the_documented_ones() -> None:
    assert preset_names() == [
        "corm",
        "h2o",
        "knorm",
        "none",
        "pyramid",
        "pyramid-by-depth",
        "pyramidinfer",
        "pyramidinfer-llama2-13b",
        "pyramidinfer-llama2-70b",
        "pyramidinfer-llama2-7b",
        "pyramidinfer-llama3-70b",
        "pyramidinfer-llama3-8b",
        "pyramidkv",
        "segments",
        "snapkv",
        "streaming",
        "tova",
        "uniform",
    ]


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
        ("pyramid", {"pool_kernel": 4}, ["'pool_kernel'", "4", "odd"]),
        ("h2o", {"prune_from": 0}, ["'accumulated'", "prune_from none"]),
        ("h2o", {"evict": "chunk"}, ["'accumulated'", "evict 'prompt_end'"]),
        ("h2o", {"queries": 4}, ["queries=4", "reads them all"]),
        ("pyramidkv", {"prune_from": 3}, ["budget='arithmetic'", "prune_from none"]),
        ("pyramidkv", {"capacity": 10}, ["capacity=10", "at least", "64"]),
        ("pyramid", {"capacity": 100}, ["capacity", "budget='arithmetic'"]),
        ("pyramid", {"prune_from": "half"}, ["'prune_from'", "'half'", "integer"]),
        ("pyramid", {"exceed_length_to_compress": 1}, ["'exceed_length", "1", "2"]),
        ("knorm", {"exceed_length_to_compress": 8}, ["'key_norm'", "none"]),
        ("pyramyd", None, ["'pyramyd'", "none, pyramid, pyramid-by-depth, "]),
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
        (
            "pyramid",
            {"scorer": "magic"},
            [
                "'scorer' is 'magic'",
                "accumulated, attention, key_diff, key_norm, recency, votes",
            ],
        ),
        ("pyramid", {"recent": 0}, ["'recent' is 0", "greater than or equal to 1"]),
        ("pyramid", {"retain": 0.5}, ["unknown setting 'retain'", "retention"]),
        ("pyramid", {"recent_ratio": 0.6}, ["recent_ratio=0.6", "retention=0.4"]),
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


def test_a_policy_is_frozen() -> None:
    policy = PolicyConfig(name="x")
    with pytest.raises(ValueError, match="frozen"):
        policy.retention = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("size", "decay", "interval"),
    [
        ("llama2-7b", 0.9, 1),
        ("llama2-13b", 0.8, 2),
        ("llama2-70b", 0.9, 3),
        ("llama3-8b", 0.9, 1),
        ("llama3-70b", 0.9, 3),
    ],
)
def test_pyramidinfer_has_the_released_parameters(
    size: str, decay: float, interval: int
) -> None:
    policy = resolve_policy(f"pyramidinfer-{size}")
    assert policy is not None
    assert policy.prefill_decay_ratio == decay
    assert policy.layerwise_downsample_interval == interval
    assert (policy.recent, policy.recent_ratio, policy.sinks) == (1, 0.2, 4)
    assert (policy.min_context, policy.distance_weight) == (64, 1.2)
    assert (policy.shape, policy.gen_decay_strategy) == ("cosine", "cosine")
    assert (policy.gen_decay_ratio, policy.gen_compress_ratio) == (0.1, 0.9)
    assert policy.exceed_length_to_compress == 16
    assert policy.prune_from == 0


def test_the_released_names_are_understood() -> None:
    theirs = {
        "streamingllm_sink_len": 2,
        "min_context_length": 9,
        "prefill_recent_ratio": 0.1,
        "prefill_decay_strategy": "linear",
    }
    policy = resolve_policy("pyramidinfer", theirs)
    assert policy is not None
    assert (policy.sinks, policy.min_context) == (2, 9)
    assert (policy.recent_ratio, policy.shape) == (0.1, "linear")
    with pytest.raises(KVPolicyError, match=r"'sinks' is given twice.*streamingllm"):
        resolve_policy("pyramidinfer", {"sinks": 2, "streamingllm_sink_len": 2})


def test_retention_replaces_the_decay_of_a_preset() -> None:
    policy = resolve_policy("pyramidinfer", {"retention": 0.6})
    assert policy is not None
    assert (policy.retention, policy.prefill_decay_ratio) == (0.6, None)
    both = resolve_policy(
        "pyramidinfer", {"retention": 0.6, "prefill_decay_ratio": 0.5}
    )
    assert both is not None
    assert both.prefill_decay_ratio == 0.5
