"""The kinds of retrieval task: what is hidden, what is asked.

The kinds are RULER's (arXiv 2404.06654), the wording is ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from random import Random

from pyramid_vllm.tools.quality.words import KEYS, PLAIN_WORDS

_NUM_DISTRACTORS = 4
_NUM_VALUES = 3
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


_NUMBERS_INTRO = (
    "Some special magic numbers are hidden in the text below. Memorize them: you will "
    "be asked for them afterwards."
)


def _number(rng: Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _needle(key: str, number: str) -> str:
    return f"The special magic number for {key} is: {number}."


def _ask_one(key: str, number: str, distractors: tuple[str, ...] = ()) -> Puzzle:
    return Puzzle(
        intro=_NUMBERS_INTRO,
        question=f"What is the special magic number for {key} mentioned above?",
        answer_start=f"The special magic number for {key} is:",
        answers=(number,),
        needles=(_needle(key, number),),
        distractors=distractors,
    )


def _ask_several(names: str, needles: dict[str, str]) -> Puzzle:
    return Puzzle(
        intro=_NUMBERS_INTRO,
        question=f"What are all the special magic numbers for {names} mentioned above?",
        answer_start=f"The special magic numbers for {names} are:",
        answers=tuple(needles),
        needles=tuple(needles.values()),
    )


def _single_needle(rng: Random) -> Puzzle:
    return _ask_one(rng.choice(KEYS), _number(rng))


def _multi_key(rng: Random) -> Puzzle:
    key, *others = rng.sample(KEYS, 1 + _NUM_DISTRACTORS)
    distractors = tuple(_needle(other, _number(rng)) for other in others)
    return _ask_one(key, _number(rng), distractors)


def _multi_value(rng: Random) -> Puzzle:
    key = rng.choice(KEYS)
    numbers = [_number(rng) for _ in range(_NUM_VALUES)]
    return _ask_several(key, {number: _needle(key, number) for number in numbers})


def _multi_query(rng: Random) -> Puzzle:
    keys = rng.sample(KEYS, _NUM_VALUES)
    needles = {}
    for key in keys:
        number = _number(rng)
        needles[number] = _needle(key, number)
    return _ask_several(f"{', '.join(keys[:-1])} and {keys[-1]}", needles)


def _chain(rng: Random, names: list[str]) -> tuple[str, tuple[str, ...]]:
    value = str(rng.randrange(10_000, 100_000))
    lines = [f"VAR {names[0]} = {value}."]
    for before, name in pairwise(names):
        lines.append(f"VAR {name} = VAR {before}.")
    return value, tuple(lines)


def _variable_tracking(rng: Random) -> Puzzle:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    triples = ["".join(triple) for triple in combinations(letters, 3)]
    names = rng.sample(triples, 2 * _CHAIN)
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
    "single_needle": _single_needle,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}
#: Tasks without a needle: their answer lies everywhere.
WITHOUT_DEPTH = frozenset({"common_words"})
