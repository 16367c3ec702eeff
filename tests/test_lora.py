"""LoRA adapters with a policy."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from pyramid_vllm.policy import KVPolicyError
from tests.engines import close, make_llm, random_prompts, scheduler_of
from tests.models import TINY_LLAMA

POLICY = {
    "retention": 0.4,
    "recent": 8,
    "min_context": 40,
    "tiers": 3,
    "exceed_length_to_compress": 4,
}
RANK = 4
# Inputs and outputs of the layers that the adapter changes.
SHAPES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (128, 64),
    "self_attn.v_proj": (128, 64),
    "self_attn.o_proj": (128, 128),
    "mlp.down_proj": (256, 128),
}


def save_adapter(folder: Path, seed: int) -> str:
    """Write a random adapter of the tiny Llama, as PEFT does."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(TINY_LLAMA["num_hidden_layers"]):
        for module, (size_in, size_out) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for part, shape in (("A", (RANK, size_in)), ("B", (size_out, RANK))):
                tensors[f"{name}.lora_{part}.weight"] = 0.1 * torch.randn(
                    shape, generator=generator
                )
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(module.split(".")[1] for module in SHAPES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        LoRARequest(f"adapter-{i}", i, save_adapter(folder / str(i), i)) for i in (1, 2)
    ]


# One more than there are: vLLM's CPU kernels give tokens without an adapter the last
# slot's, so that has to stay empty.
NUM_SLOTS = 3


@pytest.fixture(scope="module")
def llm(tiny_llama: str) -> Iterator[Any]:
    engine = make_llm(
        tiny_llama,
        kv_policy=POLICY,
        enable_lora=True,
        max_loras=NUM_SLOTS,
        max_lora_rank=8,
        max_num_batched_tokens=256,
    )
    yield engine
    close(engine)


def serve(
    llm: Any, prompts: list[list[int]], adapters: list[LoRARequest | None]
) -> list[list[int]]:
    sampling = SamplingParams(
        temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, sampling, lora_request=adapters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_adapters_in_one_batch_are_as_alone(
    llm: Any, adapters: list[LoRARequest]
) -> None:
    """Each request has its own keys, scores and evictions, in chunks, while others
    run."""
    (long, short) = random_prompts([300, 129], seed=5)
    prompts = [long, short] * 3
    chosen = [None, None, adapters[0], adapters[0], adapters[1], adapters[1]]
    together = serve(llm, prompts, chosen)
    counters = scheduler_of(llm).kv_counters
    assert counters.num_groups > 6
    assert counters.num_compactions == 6 + counters.num_groups
    alone = [
        serve(llm, [prompt], [adapter])[0]
        for prompt, adapter in zip(prompts, chosen, strict=True)
    ]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 6, "adapters change nothing"
    assert counters.num_compactions == 2 * (6 + counters.num_groups // 2)
    scheduler_of(llm).check_integrity()


def test_keeping_everything_is_stock(
    tiny_llama: str, adapters: list[LoRARequest]
) -> None:
    """With retention 1.0 each token is stock's, with an adapter and without."""
    prompts, outputs = random_prompts([300, 129], seed=5), []
    for policy in (None, {"retention": 1.0, "tiers": 3}):
        engine = make_llm(
            tiny_llama,
            enable_lora=True,
            max_loras=NUM_SLOTS,
            **({"kv_policy": policy} if policy else {}),
        )
        outputs.append(serve(engine, prompts, [None, adapters[0]]))
        close(engine)
    assert outputs[0] == outputs[1]


def test_pruning_with_adapters_is_refused(tiny_llama: str) -> None:
    with pytest.raises(KVPolicyError, match="enable_lora with prune_from=0"):
        make_llm(tiny_llama, kv_policy=POLICY | {"prune_from": 0}, enable_lora=True)
