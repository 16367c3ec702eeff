"""Quantized files become folders that vLLM loads."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, HEADS, ROWS, LAYERS = 64, 2, 96, 2
Q8_0 = gguf.GGMLQuantizationType.Q8_0
Q5_0 = gguf.GGMLQuantizationType.Q5_0


def add_tokenizer(writer: Any) -> None:
    """Add a tokenizer with as many letters as the vocabulary has rows, and one
    merge."""
    letters = [chr(33 + i) for i in range(ROWS - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<|im_end|>", *letters, "ab"])
    writer.add_token_types([3, 3] + [1] * (ROWS - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def write_gguf(file: Path, head: np.ndarray, embedding: np.ndarray) -> None:
    """A random Llama whose head is stored more precisely than its embedding."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(ROWS)
    add_tokenizer(writer)
    rng = np.random.default_rng(0)
    for name, tensor, kind in [("output", head, Q8_0), ("token_embd", embedding, Q5_0)]:
        packed = gguf.quantize(tensor, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    names = ["attn_q", "attn_k", "attn_v", "attn_output"]
    for layer in range(LAYERS):
        for name in [*names, "ffn_gate", "ffn_up", "ffn_down"]:
            weight = rng.normal(size=(HIDDEN, HIDDEN)).astype(np.float32) / 8
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight)
        for name in ("attn_norm", "ffn_norm"):
            ones = np.ones(HIDDEN, dtype=np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(file: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "convert_gguf.py")]
    return subprocess.run(
        [*command, str(file), str(folder)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_matrix_stored_twice_is_one_again(tmp_path: Path, tied: bool) -> None:
    """Of two roundings of a matrix the head's is taken; two different matrices stay
    two."""
    rng = np.random.default_rng(1)
    head, other = rng.normal(size=(2, ROWS, HIDDEN)).astype(np.float32)
    write_gguf(tmp_path / "model.gguf", head, head if tied else other)
    result = convert(tmp_path / "model.gguf", tmp_path / "folder")
    assert result.returncode == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert model.config.tie_word_embeddings == tied
    assert model.dtype == torch.float32
    rounded = gguf.dequantize(gguf.quantize(head, Q8_0), Q8_0)
    assert np.array_equal(model.lm_head.weight.detach().numpy(), rounded)
    embedding = model.model.embed_tokens.weight.detach().numpy()
    assert np.array_equal(embedding, rounded) == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "folder").encode("ab") == [ROWS - 1]


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    result = convert(tmp_path / "model.gguf", tmp_path)
    assert result.returncode == 2
    words = " ".join(result.stderr.replace("│", " ").split())
    assert "valid is a path that does not exist yet" in words
