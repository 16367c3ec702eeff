"""Retrieval samples of an exact length, with a needle at an exact depth."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from pyramid_vllm.tools.chat import chat_ids, encode, has_template
from pyramid_vllm.tools.quality.puzzles import PUZZLES, Puzzle
from pyramid_vllm.tools.quality.words import sentences

#: Names of the tasks.
TASKS = tuple(PUZZLES)
#: Share of the haystack over which several needles of one question spread.
_SPREAD = 0.2
#: Output tokens beyond those of the answers, for each answer.
_SLACK = 12


@dataclass(frozen=True)
class Sample:
    """One prompt and what its answer must hold."""

    task: str
    num_tokens: int
    """The length asked for; the prompt is at most that long."""
    depth: float
    """Position of the needle: 0 oldest, 1 newest."""
    prompt_ids: list[int]
    answers: tuple[str, ...]
    max_tokens: int


def score(sample: Sample, text: str) -> float:
    """Share of the answers that an output contains, as whole words."""
    found = [
        re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)
        for answer in sample.answers
    ]
    return sum(match is not None for match in found) / len(found)


def make_samples(
    task: str,
    tokenizer: Any,
    num_tokens: int,
    depth: float,
    num_samples: int,
    seed: int,
    haystack_text: str | None = None,
) -> list[Sample]:
    """Make samples of one task, one length, one depth.

    Args:
        task: one of ``TASKS``.
        tokenizer: a Hugging Face tokenizer; its chat template is used if it has one.
        num_tokens: longest prompt, template and answer's beginning included.
        depth: where the needle lies: 0 oldest, 1 newest.
        num_samples: how many.
        seed: of all that is random in them.
        haystack_text: its sentences are the haystack, else synthetic ones.

    Raises:
        ValueError: ``num_tokens`` is too small, or the text has no sentence.
    """
    texts = None if haystack_text is None else split_sentences(haystack_text)
    samples = []
    for index in range(num_samples):
        rng = Random(f"{seed} {task} {num_tokens} {depth} {index}")
        puzzle = PUZZLES[task](rng)
        hay = puzzle.haystack
        if hay is None:
            hay = sentences(rng) if texts is None else _cycle(texts, rng)
        ids = _fit(tokenizer, puzzle, hay, num_tokens, depth)
        answer = encode(tokenizer, " " + ", ".join(puzzle.answers))
        length = len(answer) + _SLACK * len(puzzle.answers)
        samples.append(Sample(task, num_tokens, depth, ids, puzzle.answers, length))
    return samples


def split_sentences(text: str) -> list[str]:
    """Sentences of a text without headings and short leftovers.

    Raises:
        ValueError: there are none.
    """
    found = re.split(r"(?<=[.!?])\s+|\n+", text)
    kept = [" ".join(sentence.split()) for sentence in found]
    kept = [s for s in kept if len(s) > 20 and s[-1] in ".!?"]
    if not kept:
        raise ValueError("the haystack's text has no sentence to hide a needle between")
    return kept


def _cycle(texts: list[str], rng: Random) -> Iterator[str]:
    start = rng.randrange(len(texts))
    while True:
        yield from texts[start:] + texts[:start]


def _prompt_ids(tokenizer: Any, puzzle: Puzzle, lines: list[str]) -> list[int]:
    message = f"{puzzle.intro}\n\n{' '.join(lines)}\n\n{puzzle.question}"
    if has_template(tokenizer):
        return chat_ids(tokenizer, message, answer_start=puzzle.answer_start)
    ids: list[int] = tokenizer.encode(f"{message}\n{puzzle.answer_start}")
    return ids


def _fit(
    tokenizer: Any, puzzle: Puzzle, hay: Iterator[str], num_tokens: int, depth: float
) -> list[int]:
    """The prompt over as much of a haystack as fits."""
    pieces: list[tuple[str, int]] = []
    """Each with its tokens."""
    length = len(_prompt_ids(tokenizer, puzzle, _hide(puzzle, pieces, depth)))
    if length >= num_tokens:
        raise ValueError(
            f"retrieval_tokens is {num_tokens}: valid for this task and tokenizer is "
            f"more than {length}"
        )
    while length < num_tokens:
        piece = next(hay)
        pieces.append((piece, len(encode(tokenizer, " " + piece))))
        length += pieces[-1][1]
    while True:
        ids = _prompt_ids(tokenizer, puzzle, _hide(puzzle, pieces, depth))
        if len(ids) <= num_tokens:
            return ids
        pieces.pop()


def _hide(puzzle: Puzzle, pieces: list[tuple[str, int]], depth: float) -> list[str]:
    """The haystack's pieces: needles around the depth, distractors all over."""
    gaps = len(puzzle.needles) - 1
    first, gap = depth, 0.0
    if gaps > 0:
        first, gap = depth * (1 - _SPREAD), _SPREAD / gaps
    places = [(first + gap * i, line) for i, line in enumerate(puzzle.needles)]
    for i, line in enumerate(puzzle.distractors):
        places.append(((i + 0.5) / len(puzzle.distractors), line))
    ends = list(accumulate((size for _, size in pieces), initial=0))
    lines = [text for text, _ in pieces]
    # Insert from the end, so that earlier positions stay valid.
    places.sort(key=lambda place: place[0])
    for share, line in reversed(places):
        goal = share * ends[-1]
        lines.insert(min(range(len(ends)), key=lambda i: abs(ends[i] - goal)), line)
    return lines
