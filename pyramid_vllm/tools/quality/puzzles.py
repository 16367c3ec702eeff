"""The kinds of retrieval task: which numbers are hidden, which of them are asked for.

The kinds are RULER's (arXiv 2404.06654), the wording is ours.
"""

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from pyramid_vllm.tools.quality.words import KEYS

INTRO = (
    "Some special magic numbers are hidden in the text below. Memorize them: you will "
    "be asked for them afterwards."
)


class Kind(NamedTuple):
    """What a task hides: numbers under keys."""

    num_keys: int = 1
    """Keys that are asked for."""
    num_values: int = 1
    """Numbers of each of these keys."""
    num_others: int = 0
    """Keys that are not asked for, with a number each."""


KINDS = {
    "single_needle": Kind(),
    "multi_key": Kind(num_others=4),
    "multi_value": Kind(num_values=3),
    "multi_query": Kind(num_keys=3),
}


@dataclass(frozen=True)
class Puzzle:
    """One sample before its haystack."""

    question: str
    answer_start: str
    """How the assistant's answer begins; the model goes on from there."""
    answers: tuple[str, ...]
    needles: tuple[str, ...]
    """Asked for: they lie around the depth."""
    distractors: tuple[str, ...]
    """Not asked for: spread over the whole haystack."""


def make_puzzle(kind: Kind, rng: Random) -> Puzzle:
    """Draw keys and numbers."""
    keys = rng.sample(KEYS, kind.num_keys + kind.num_others)
    keys, others = keys[: kind.num_keys], keys[kind.num_keys :]
    distractors = [(key, _number(rng)) for key in others]
    hidden = [(key, _number(rng)) for key in keys for _ in range(kind.num_values)]
    names = keys[-1] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    what, verb, number = "is the", "is", "number"
    if len(hidden) > 1:
        what, verb, number = "are all the", "are", "numbers"
    return Puzzle(
        question=f"What {what} special magic {number} for {names} mentioned above?",
        answer_start=f"The special magic {number} for {names} {verb}:",
        answers=tuple(number for _, number in hidden),
        needles=tuple(map(_needle, hidden)),
        distractors=tuple(map(_needle, distractors)),
    )


def _needle(pair: tuple[str, str]) -> str:
    key, number = pair
    return f"The special magic number for {key} is: {number}."


def _number(rng: Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))
