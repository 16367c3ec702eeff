"""Requests: the same seed makes the same ones, whichever side gets them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.quality.texts import python_manual

#: The tokens that each conversation adds after its last answer.
Turn = list[list[int]]


@dataclass(frozen=True)
class Requests:
    """The requests that every side gets, numbered turn by turn."""

    turns: list[Turn]
    output_lengths: list[int]
    """Output tokens of every request."""
    source: str
    """What the prompts are made of, in words."""

    @cached_property
    def prompt_lengths(self) -> list[int]:
        """Prompt tokens of every request, with all that its conversation had
        before."""
        num = len(self.turns[0])
        lengths: list[int] = []
        for number, part in enumerate(chain(*self.turns)):
            last = number - num
            before = lengths[last] + self.output_lengths[last] if last >= 0 else 0
            lengths.append(before + len(part))
        return lengths

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each conversation's last request, prompt and output."""
        num = len(self.turns[0])
        prompts, outputs = self.prompt_lengths[-num:], self.output_lengths[-num:]
        return list(map(int.__add__, prompts, outputs))


def windows(tokens: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Consecutive runs of tokens, as many as there are tokens for."""
    ends = np.cumsum(lengths).tolist()
    return [
        list(tokens[end - length : end])
        for end, length in zip(ends, lengths, strict=True)
        if end <= len(tokens)
    ]


def draw_prompts(
    tokenizer: Any, vocab_size: int, lengths: Sequence[int], seed: int
) -> tuple[list[list[int]], str]:
    """Prompts from Python's own documentation, then of random tokens; also what they
    are made of, in words."""
    prompts: list[list[int]] = []
    allowed = np.arange(vocab_size)
    if tokenizer is not None:
        tokens = tokenizer.encode(python_manual(), add_special_tokens=False)
        prompts = windows(tokens, lengths)
        allowed = np.setdiff1d(allowed, tokenizer.all_special_ids)
    rng = np.random.default_rng(seed + 1)
    num_real, num = len(prompts), len(lengths)
    prompts += [rng.choice(allowed, length).tolist() for length in lengths[num_real:]]
    return prompts, (
        f"{num_real} of real text (Python's language reference), "
        f"{num - num_real} of random token ids"
    )


def make_requests(settings: BenchSettings, tokenizer: Any, vocab_size: int) -> Requests:
    """Draw all turns; lengths are uniform in their ranges, and the prefixes that
    prompts share are drawn before them."""
    num, shared = settings.num_prompts, settings.shared_prefix
    rng = np.random.default_rng(settings.seed)
    own, outputs = (
        rng.integers(of.low, of.high + 1, settings.num_requests).tolist()
        for of in (settings.prompt_tokens, settings.output_tokens)
    )
    num_prefixes = settings.num_prefixes if shared else 0
    lengths = [shared] * num_prefixes + own
    parts, source = draw_prompts(tokenizer, vocab_size, lengths, settings.seed)
    prefixes, parts = parts[:num_prefixes], parts[num_prefixes:]
    turns = [parts[start : start + num] for start in range(0, len(parts), num)]
    if prefixes:
        turns[0] = [
            prefixes[i % num_prefixes] + part for i, part in enumerate(turns[0])
        ]
    return Requests(turns, outputs, source)
