"""Scorers by name, with the properties that the scheduler needs."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

#: Entry point group in which installed packages offer scorers.
ENTRY_POINTS = "pyramid_vllm.scorers"


class Queries(Enum):
    """Which queries of a prompt a scorer reads."""

    NONE = "none"
    WINDOW = "window"
    """Queries of the newest tokens."""
    ALL = "all"
    """All queries; the scores of chunks are added up."""


@dataclass(frozen=True)
class Scorer:
    """A function from a layer's queries and keys to scores, and its properties."""

    function: Callable[..., Any] | str
    """A ``scorers.ScoreFunction``, or its ``module:name``. Built-in functions are
    imported when they are called, because policies are read without torch."""
    queries: Queries
    is_same_for_all_heads: bool = False
    """Whether a token has the same score in all heads, on all ranks."""
    is_pooled: bool = False
    """Whether ``pooling`` is applied to its scores."""
    scores_groups: bool = False
    """Whether it may also score groups of generated tokens: only tested scorers may."""
    scores_segments: bool = False
    """Whether it may score segments: only tested scorers may."""

    def __post_init__(self) -> None:
        if self.is_pooled and self.queries is Queries.ALL:
            raise ValueError("is_pooled is True: scores that add up are never pooled")

    def __call__(self, inputs: Any, config: Any) -> Any:
        """Scores: see ``scorers.ScoreFunction``."""
        return self._loaded(inputs, config)

    @cached_property
    def _loaded(self) -> Callable[..., Any]:
        function = self.function
        return _named(function) if isinstance(function, str) else function


def scorer(
    queries: Queries, *, is_same_for_all_heads: bool = False, is_pooled: bool = False
) -> Callable[[Callable[..., Any]], Scorer]:
    """Decorator that makes a ``scorers.ScoreFunction`` a ``Scorer``.

    Args:
        queries: the queries that it reads.
        is_same_for_all_heads: see ``Scorer``.
        is_pooled: see ``Scorer``.
    """

    def decorate(function: Callable[..., Any]) -> Scorer:
        return Scorer(function, queries, is_same_for_all_heads, is_pooled)

    return decorate


_HERE = "pyramid_vllm.scorers"

#: Built-in scorers; ``find_scorer`` also finds others.
SCORERS: dict[str, Scorer] = {
    "attention": Scorer(
        f"{_HERE}:attention",
        Queries.WINDOW,
        is_pooled=True,
        scores_groups=True,
        scores_segments=True,
    ),
    "accumulated": Scorer(f"{_HERE}:accumulated", Queries.ALL),
    "key_norm": Scorer(f"{_HERE}:key_norm", Queries.NONE, scores_segments=True),
    "key_diff": Scorer(f"{_HERE}:key_diff", Queries.NONE, scores_segments=True),
    "recency": Scorer(
        f"{_HERE}:recency",
        Queries.NONE,
        is_same_for_all_heads=True,
        scores_groups=True,
    ),
    "votes": Scorer(f"{_HERE}:votes", Queries.WINDOW),
}


@lru_cache
def find_scorer(name: str) -> Scorer:
    """A built-in scorer, that of an entry point, or ``module:name``.

    Raises:
        ValueError: no scorer has that name, or the object is not a scorer.
    """
    if name in SCORERS:
        return SCORERS[name]
    offered = entry_points(group=ENTRY_POINTS, name=name)
    if not offered and ":" not in name:
        raise ValueError(f"valid scorers are {_valid()}")
    try:
        found = next(iter(offered)).load() if offered else _named(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"it cannot be imported: {error}") from None
    if not isinstance(found, Scorer):
        raise ValueError(
            f"it is of type {type(found).__name__}: valid is a function with "
            "@scorer(...) of pyramid_vllm.policy"
        )
    return found


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _valid() -> str:
    names = {*SCORERS, *entry_points(group=ENTRY_POINTS).names}
    return f"{', '.join(sorted(names))}, and 'module:name' of one of your own"
