"""The kinds of retrieval task: what is hidden, what is asked.

The kinds are RULER's (arXiv 2404.06654), the wording is ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from random import Random

from pyramid_vllm.tools.quality.words import KEYS, PLAIN_WORDS

_NUM_COMMON = 3
_CHAIN = 3


@dataclass(frozen=True)
class Puzzle:
    """One sample before its haystack."""

    intro: str
    question: str
    answer_start: str
    """How the assistant's answer begins; the model goes on from there."""
    answers: tuple[str, ...]
    needles: tuple[str, ...] = ()
    """Asked for: lie around the depth."""
    distractors: tuple[str, ...] = ()
    """Not asked for: spread over the whole haystack."""
    haystack: Iterator[str] | None = None
    """The task's own, instead of sentences."""


def _number(rng: Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _needles(pairs: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"The special magic number for {k} is: {n}." for k, n in pairs)


def _magic_numbers(
    rng: Random, num_keys: int = 1, num_values: int = 1, num_others: int = 0
) -> Puzzle:
    """Keys, the numbers of each that are asked for, and other keys' numbers."""
    keys = rng.sample(KEYS, num_keys + num_others)
    others = [(key, _number(rng)) for key in keys[num_keys:]]
    asked = keys[:num_keys]
    hidden = [(key, _number(rng)) for key in asked for _ in range(num_values)]
    names = " and ".join(filter(None, (", ".join(asked[:-1]), asked[-1])))
    what, verb, number = "is the", "is", "number"
    if len(hidden) > 1:
        what, verb, number = "are all the", "are", "numbers"
    return Puzzle(
        intro="Some special magic numbers are hidden in the text below. Memorize "
        "them: you will be asked for them afterwards.",
        question=f"What {what} special magic {number} for {names} mentioned above?",
        answer_start=f"The special magic {number} for {names} {verb}:",
        answers=tuple(number for _, number in hidden),
        needles=_needles(hidden),
        distractors=_needles(others),
    )


def _chain(rng: Random, names: list[str]) -> tuple[str, tuple[str, ...]]:
    value = str(rng.randrange(10_000, 100_000))
    later = [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
    return value, (f"VAR {names[0]} = {value}.", *later)


def _variable_tracking(rng: Random) -> Puzzle:
    triples = map("".join, combinations("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 3))
    names = rng.sample(list(triples), 2 * _CHAIN)
    value, lines = _chain(rng, names[:_CHAIN])
    _, others = _chain(rng, names[_CHAIN:])
    return Puzzle(
        intro="Variables are assigned in the text below. Memorize the assignments.",
        question=f"Which variables have the value {value}, directly or through others?",
        answer_start=f"The {_CHAIN} variables that have the value {value} are: VAR",
        answers=tuple(names[:_CHAIN]),
        needles=lines,
        distractors=others,
    )


def _common_words(rng: Random) -> Puzzle:
    common = tuple(rng.sample(PLAIN_WORDS, _NUM_COMMON))
    return Puzzle(
        intro="Below is a list of words. Some appear far more often than others.",
        question=f"What are the {_NUM_COMMON} most common words in the list above?",
        answer_start=f"The {_NUM_COMMON} most common words are:",
        answers=common,
        haystack=_word_list(rng, common),
    )


def _word_list(rng: Random, common: tuple[str, ...]) -> Iterator[str]:
    """Endless runs of words, in which half of the words are the common ones."""
    rest = [word for word in PLAIN_WORDS if word not in common]
    while True:
        words = [*common, *common, *rng.sample(rest, 2 * len(common))]
        rng.shuffle(words)
        yield ", ".join(words) + ","


PUZZLES: dict[str, Callable[[Random], Puzzle]] = {
    "single_needle": _magic_numbers,
    "multi_key": partial(_magic_numbers, num_others=4),
    "multi_value": partial(_magic_numbers, num_values=3),
    "multi_query": partial(_magic_numbers, num_keys=3),
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}
#: Tasks without a needle: their answer lies everywhere.
WITHOUT_DEPTH = frozenset({"common_words"})
