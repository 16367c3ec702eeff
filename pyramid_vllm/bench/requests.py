"""Requests: the same seed makes the same ones, whichever side gets them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from pyramid_vllm.bench.settings import TokenRange


@dataclass(frozen=True)
class Requests:
    """What every side is asked."""

    prompts: list[list[int]]
    """Empty: vLLM's own client draws them."""
    output_lengths: list[int]
    lengths: list[int]
    """Tokens of each request, prompt and output; at most, where the client draws."""
    prompt_lengths: frozenset[int]
    """Lengths of prompts that are sure to be there."""
    source: str
    """What the prompts are made of, in words."""

    @classmethod
    def of(
        cls, prompts: list[list[int]], output_lengths: list[int], source: str
    ) -> "Requests":
        """Requests that are known."""
        pairs = zip(prompts, output_lengths, strict=True)
        return cls(
            prompts,
            output_lengths,
            [len(prompt) + output for prompt, output in pairs],
            frozenset(map(len, prompts)),
            source,
        )

    @classmethod
    def drawn_by_client(
        cls, num: int, prompt: TokenRange, output: TokenRange
    ) -> "Requests":
        """Requests of which only the ranges are known."""
        return cls(
            [],
            [output.high] * num,
            [prompt.high + output.high] * num,
            frozenset({prompt.low}),
            "random, by vLLM's client",
        )


def draw_lengths(
    num: int, prompt: TokenRange, output: TokenRange, seed: int
) -> tuple[list[int], list[int]]:
    """Lengths of prompts and of outputs, uniform in their ranges."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(prompt.low, prompt.high + 1, num).tolist(),
        rng.integers(output.low, output.high + 1, num).tolist(),
    )


def windows(tokens: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Consecutive runs of tokens, as many as there are tokens for."""
    ends = np.cumsum(lengths)
    return [
        list(tokens[end - length : end])
        for end, length in zip(ends.tolist(), lengths, strict=True)
        if end <= len(tokens)
    ]


def text_prompts(
    tokenizer: Any, file: Path, lengths: Sequence[int]
) -> tuple[list[list[int]], str]:
    """Prompts from a file.

    Raises:
        ValueError: it has not as many tokens.
        OSError: it cannot be read.
    """
    if tokenizer is None:
        raise ValueError(f"--text is {file}: the model's folder has no tokenizer")
    tokens = _encode(tokenizer, file.read_text(encoding="utf-8"))
    if sum(lengths) > len(tokens):
        raise ValueError(
            f"--text {file} has {len(tokens)} tokens, the prompts have {sum(lengths)}: "
            "valid are fewer or shorter prompts, or a longer text"
        )
    return windows(tokens, lengths), f"consecutive windows of {file.name}"


def synthetic_prompts(
    tokenizer: Any, vocab_size: int, lengths: Sequence[int], seed: int
) -> tuple[list[list[int]], str]:
    """Prompts from Python's own documentation, then of random tokens."""
    prompts: list[list[int]] = []
    allowed = np.arange(vocab_size)
    if tokenizer is not None:
        text = "\n\n".join(topics[name] for name in sorted(topics))
        prompts = windows(_encode(tokenizer, text), lengths)
        allowed = np.setdiff1d(allowed, tokenizer.all_special_ids)
    rng = np.random.default_rng(seed + 1)
    num_real = len(prompts)
    for length in lengths[num_real:]:
        prompts.append(rng.choice(allowed, length).tolist())
    if num_real == len(lengths):
        return prompts, "real text: Python's language reference"
    return prompts, (
        f"{num_real} of real text (Python's language reference), "
        f"{len(lengths) - num_real} of random token ids"
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
