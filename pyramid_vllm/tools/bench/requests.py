"""Requests: the same seed makes the same ones, whichever side gets them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from pyramid_vllm.tools.bench.conversations import turn_lengths
from pyramid_vllm.tools.bench.settings import BenchSettings, TokenRange


@dataclass(frozen=True)
class Requests:
    """What every side is asked."""

    prompts: list[list[int]]
    """Of first turns. Empty: vLLM's own client draws them."""
    output_lengths: list[int]
    """Of every request, turn by turn."""
    lengths: list[int]
    """Tokens of each conversation's last request, prompt and output; at most, where
    the client draws."""
    prompt_lengths: frozenset[int]
    """Lengths of prompts that are sure to be there."""
    source: str
    """What the prompts are made of, in words."""
    later_turns: list[list[list[int]]] = field(default_factory=list)
    """Of each later turn, what each conversation adds to the answer before it."""

    @classmethod
    def of(
        cls, turns: list[list[list[int]]], output_lengths: list[int], source: str
    ) -> "Requests":
        """Requests that are known.

        Args:
            turns: of each turn, the tokens that each conversation adds.
            output_lengths: of every request, turn by turn.
            source: what the prompts are made of, in words.
        """
        num = len(turns[0])
        added = [[len(part) for part in turn] for turn in turns]
        prompts = turn_lengths(added, output_lengths)
        last = zip(prompts[-num:], output_lengths[-num:], strict=True)
        return cls(
            prompts=turns[0],
            output_lengths=output_lengths,
            lengths=[prompt + output for prompt, output in last],
            prompt_lengths=frozenset(prompts),
            source=source,
            later_turns=turns[1:],
        )

    @classmethod
    def drawn_by_client(
        cls, num: int, shared_prefix: int, prompt: TokenRange, output: TokenRange
    ) -> "Requests":
        """Requests of which only the ranges are known.

        Args:
            num: how many.
            shared_prefix: tokens that all prompts begin with.
            prompt: tokens behind these.
            output: lengths of outputs.
        """
        return cls(
            [],
            [output.high] * num,
            [shared_prefix + prompt.high + output.high] * num,
            frozenset({shared_prefix + prompt.low}),
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


def share_prefixes(
    prefixes: Sequence[list[int]], prompts: Sequence[list[int]]
) -> list[list[int]]:
    """Prompts behind the prefixes, which take turns."""
    if not prefixes:
        return list(prompts)
    return [
        prefixes[index % len(prefixes)] + prompt for index, prompt in enumerate(prompts)
    ]


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


def make_requests(settings: BenchSettings, tokenizer: Any, vocab_size: int) -> Requests:
    """Draw all turns; the prefixes that prompts share are drawn before them.

    Raises:
        ValueError: a text is too short for them.
        OSError: it cannot be read.
    """
    num, shared = settings.num_prompts, settings.shared_prefix
    prompt, output = settings.prompt_tokens, settings.output_tokens
    if settings.workload == "online" and settings.text is None:
        return Requests.drawn_by_client(num, shared, prompt, output)
    lengths, outputs = draw_lengths(num * settings.turns, prompt, output, settings.seed)
    num_prefixes = settings.num_prefixes if shared else 0
    lengths = [shared] * num_prefixes + lengths
    if settings.text is not None:
        parts, source = text_prompts(tokenizer, settings.text, lengths)
    else:
        parts, source = synthetic_prompts(tokenizer, vocab_size, lengths, settings.seed)
    prefixes, own = parts[:num_prefixes], parts[num_prefixes:]
    turns = [own[start : start + num] for start in range(0, len(own), num)]
    turns[0] = share_prefixes(prefixes, turns[0])
    return Requests.of(turns, outputs, source)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
