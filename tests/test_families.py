"""Families of models beyond plain decoders: attention sinks, M-RoPE, images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from pyramid_vllm.checks import _check_model
from pyramid_vllm.kernels import on_torch
from pyramid_vllm.policy import KVPolicyError, resolve_policy
from pyramid_vllm.worker.prune import RowPruner, decoder_layers
from tests.engines import (
    close,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
    worker_of,
)
from tests.models import TINY_LLAMA

POLICY = {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 2}
PROMPTS = random_prompts([300, 40, 517, 129], vocab_size=490, seed=5)
NEEDS_TORCHVISION = "vLLM's Qwen-VL models import it"


def randomize(model: nn.Module) -> None:
    """A new model's biases are zero, and its sinks too small to matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            if name.endswith("sinks"):
                parameter.normal_(8, 8)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random GPT-OSS: every second layer has full attention, all have sinks."""
    config = GptOssConfig(
        **TINY_LLAMA | {"intermediate_size": 128},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        # The only kind of RoPE that vLLM reads for this model.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).float()
    randomize(model)
    folder = tmp_path_factory.mktemp("gpt-oss")
    model.save_pretrained(folder)
    return str(folder)


def dense_choice(
    attention: torch.Tensor, count: int, recent: int, weight: float
) -> list[int]:
    """Four first tokens, the recent ones and the best between them.

    Args:
        attention: ``[heads, num_tokens, num_tokens]``, float64.
        count: tokens to keep.
        recent: newest tokens, which score.
        weight: of the newest query.
    """
    weights = torch.linspace(1, weight, recent, dtype=torch.float64)
    scores = torch.einsum("hqk,q->k", attention[:, -recent:], weights)
    end = len(scores) - recent
    best = scores[4:end].argsort(descending=True)[: count - 4 - recent] + 4
    return sorted([*range(4), *best.tolist(), *range(end, len(scores))])


def test_sinks_share_in_the_scores(
    gpt_oss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept tokens are those of a dense float64 model that has the sinks."""
    choices: list[list[int]] = []
    select = on_torch.select

    def recording(scores: Any, out: Any, spans: Any, **kwargs: Any) -> None:
        select(scores, out, spans, **kwargs)
        choices.extend(kept[0, : int(spans.num_kept[0])].tolist() for kept in out)

    monkeypatch.setattr(on_torch, "select", recording)
    llm = make_llm(gpt_oss, kv_policy="pyramid-by-depth", kv_policy_config=POLICY)
    generate(llm, PROMPTS[:1], 2)
    close(llm)
    dense = GptOssForCausalLM.from_pretrained(
        gpt_oss,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    with torch.no_grad():
        output = dense(torch.tensor(PROMPTS[:1]), output_attentions=True)
    expected, without = [], []
    for index, kept in zip((1, 3, 5), choices, strict=True):
        attention = output.attentions[index][0].double()
        expected.append(dense_choice(attention, len(kept), 24, 1.2))
        whole = attention / attention.sum(-1, keepdim=True)
        without.append(dense_choice(whole, len(kept), 24, 1.2))
    assert choices == expected
    assert choices != without


def test_layers_with_sinks_are_tiered(gpt_oss: str) -> None:
    """Sliding layers are untouched, and each request in a batch gets its tokens as
    alone."""
    stock = make_llm(gpt_oss)
    expected = [g.tokens for g in generate(stock, PROMPTS, 24)]
    close(stock)
    check_policies(gpt_oss, expected, [{"exceed_length_to_compress": 8}])


def check_policies(
    model: str, expected: list[list[int]], changes: list[dict[str, Any]]
) -> None:
    """Where all is kept, tokens are stock's; otherwise they are those of each request
    alone."""
    for change in [{"retention": 1.0}, *changes]:
        llm = make_llm(
            model, kv_policy="pyramid-by-depth", kv_policy_config=POLICY | change
        )
        together = [g.tokens for g in generate(llm, PROMPTS, 24)]
        counters = scheduler_of(llm).kv_counters
        if change == {"retention": 1.0}:
            assert together == expected
        else:
            alone = [generate(llm, [prompt], 24)[0].tokens for prompt in PROMPTS]
            assert together == alone
            assert counters.num_compactions == 6
        if "prune_from" in change:
            assert worker_of(llm).tier_state.counters.num_pruned_steps > 0
        close(llm)


def save_qwen_vl(folder: Path) -> str:
    """Write a random Qwen2.5-VL and a processor for it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    text = {key: TINY_LLAMA[key] for key in TINY_LLAMA if key != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    special = ["image_pad", "video_pad", "vision_start", "vision_end"]
    config = transformers.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": text["hidden_size"],
            "num_heads": 2,
            "fullatt_block_indexes": [1],
        },
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).float()
    randomize(model)
    model.save_pretrained(folder)
    names = {500 + index: f"<|{name}|>" for index, name in enumerate(special)}
    vocab = {names.get(index, f"w{index}"): index for index in range(512)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            min_pixels=28 * 28, max_pixels=56 * 56 * 16
        ),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="w2",
            pad_token="w3",
            additional_special_tokens=list(names.values()),
        ),
        video_processor=transformers.Qwen2VLVideoProcessor(),
    ).save_pretrained(folder)
    return str(folder)


def with_images() -> list[dict[str, Any]]:
    """The prompts, all but one of them with an image."""
    from PIL import Image

    rng = np.random.default_rng(0)
    requests: list[dict[str, Any]] = [{"prompt_token_ids": PROMPTS[0]}]
    sizes = [(112, 180), (140, 200), (56, 224)]
    for prompt, size in zip(PROMPTS[1:], sizes, strict=True):
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        tokens = [*prompt[:30], 502, 500, 503, *prompt[30:]]
        images = {"image": [Image.fromarray(pixels)]}
        requests.append({"prompt_token_ids": tokens, "multi_modal_data": images})
    return requests


def outputs(llm: Any, requests: list[dict[str, Any]]) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False
    )
    results = llm.generate(requests, sampling, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def test_images_and_mrope(tmp_path: Path) -> None:
    """Prompts with images give stock's tokens where all is kept, else those of each
    request alone. This holds for pruned rows too, whose positions have three
    channels."""
    pytest.importorskip("torchvision", reason=NEEDS_TORCHVISION)
    model, requests = save_qwen_vl(tmp_path), with_images()
    settings = {
        "skip_tokenizer_init": False,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
    }
    stock = make_llm(model, **settings)
    expected = outputs(stock, requests)
    close(stock)
    for change in ({"retention": 1.0}, {"evict": "chunk"}, {"prune_from": 0}):
        policy = POLICY | change
        llm = make_llm(
            model, kv_policy="pyramid-by-depth", kv_policy_config=policy, **settings
        )
        together = outputs(llm, requests)
        if "retention" in change:
            assert together == expected
        else:
            assert together == [outputs(llm, [request])[0] for request in requests]
            assert scheduler_of(llm).kv_counters.num_compactions > 0
        if "prune_from" in change:
            assert worker_of(llm).tier_state.counters.num_pruned_steps > 0
        close(llm)


class _Layer(nn.Module):
    """Keeps the positions that it is called with."""

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        self.positions = positions
        return hidden_states, residual


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(2))

    def forward(self, positions: Any, inputs_embeds: Any) -> Any:
        hidden_states, residual = inputs_embeds, None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states


class _DeepStack(_Stack):
    def forward(  # type: ignore[override]
        self, positions: Any, inputs_embeds: Any, deepstack_input_embeds: Any
    ) -> Any:
        return super().forward(positions, inputs_embeds)


class _Model(nn.Module):
    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.model = stack

    def forward(self, positions: Any, inputs_embeds: Any) -> Any:
        return self.model(positions, inputs_embeds)


NAMES = [f"model.layers.{index}.self_attn.attn" for index in range(2)]


@pytest.mark.parametrize("channels", [(), (3,)])
def test_pruned_rows_have_their_positions(
    channels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With M-RoPE a token has three positions."""
    monkeypatch.setattr("pyramid_vllm.worker.prune._run_uncompiled", lambda *_: None)
    model = _Model(_Stack())
    pruner = RowPruner(model, decoder_layers(model, NAMES), (0, 1))
    kept = torch.tensor([0, 3, 4])
    positions = torch.randint(0, 99, (*channels, 6))
    rows = torch.randn(6, 2)
    step: Any = SimpleNamespace(kernels=on_torch)
    with pruner.pruning(step):
        pruner._kept[1] = kept
        output = model(positions, rows)
    first, last = model.model.layers
    assert first.positions.equal(positions)
    assert last.positions.equal(positions[..., kept])
    assert output[kept].equal(rows[kept])


def test_layers_that_add_to_rows_are_not_pruned() -> None:
    """Qwen3-VL's first layers add features of images to all rows."""
    with pytest.raises(KVPolicyError, match="_Model: its layers take deepstack_input"):
        decoder_layers(_Model(_DeepStack()), NAMES)


def test_attention_in_both_directions_is_refused() -> None:
    config = SimpleNamespace(
        use_mla=False,
        runner_type="generate",
        is_hybrid=False,
        is_encoder_decoder=False,
        is_mm_prefix_lm=True,
        rswa_window=None,
        model="gemma3",
    )
    with pytest.raises(KVPolicyError, match="both directions to images='gemma3'"):
        _check_model(config, resolve_policy("pyramid-by-depth"))  # type: ignore[arg-type]
