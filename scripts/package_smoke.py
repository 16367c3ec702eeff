"""Uses an installed pyramid-vllm: `scripts/check-package` runs it.

Arguments: the version that must be installed, and the folder of a model's
configuration (weights are random); --in-process keeps the engine in this process,
which is faster.
"""

import os
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pyramid_vllm

PROMPT_TOKENS, OUTPUT_TOKENS = 400, 8
ENTRY_POINTS = {
    "pyramid-vllm": "pyramid_vllm.tools.cli:app",
    "pyramid_vllm": "pyramid_vllm.plugin:register",
    "pyramid_vllm_ray_cpu": "pyramid_vllm.ray.platform:register",
}


def check_install(version: str) -> None:
    """The imported package and its metadata are of this environment."""
    place = Path(pyramid_vllm.__file__).parent
    assert place.is_relative_to(sys.prefix), f"{place} is not below {sys.prefix}"
    installed = distribution("pyramid-vllm")
    assert Path(str(installed.locate_file(""))) == place.parent
    assert installed.version == pyramid_vllm.__version__ == version
    entries = installed.entry_points
    assert {entry.name: entry.value for entry in entries} == ENTRY_POINTS
    assert all(callable(entry.load()) for entry in entries)


def check_files() -> None:
    """Data files are found, inside the package."""
    from pyramid_vllm.policy.presets import config_dir

    place = Path(pyramid_vllm.__file__).parent
    for folder in ("policies", "profiles", "grafana", "prometheus"):
        assert config_dir(folder).parent.parent == place
        assert any(config_dir(folder).iterdir())
    for preset in pyramid_vllm.preset_names():
        pyramid_vllm.resolve_policy(preset)


def tokens_evicted(model: str, policy: str) -> float:
    """Serve two prompts and count the KV entries that were evicted."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        kv_policy=policy,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        kv_cache_memory_bytes=16 * 2**20,
        max_model_len=1024,
        disable_log_stats=False,
    )
    sampling = SamplingParams(
        max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False
    )
    prompts: list[Any] = [
        {"prompt_token_ids": [start + token for token in range(PROMPT_TOKENS)]}
        for start in (0, 100)
    ]
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        assert len(output.outputs[0].token_ids) == OUTPUT_TOKENS
    evicted = [
        metric.value
        for metric in llm.get_metrics()
        if metric.name == "vllm:kv_policy_tokens_evicted"
    ]
    llm.llm_engine.engine_core.shutdown()
    return sum(evicted)


def main(version: str, model: str, *options: str) -> None:
    if "--in-process" in options:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    check_install(version)
    check_files()
    evicted = tokens_evicted(model, "pyramid")
    assert evicted > 0, "the policy is off"
    print(f"{evicted:.0f} tokens evicted in the fresh environment")


if __name__ == "__main__":
    main(*sys.argv[1:])
