"""Scorers by name, and what the policy knows of each without running it."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

#: Installed packages offer scorers by entry points of this group.
ENTRY_POINTS = "pyramid_vllm.scorers"


class Queries(Enum):
    """Which queries of a prompt a scorer reads."""

    NONE = "none"
    WINDOW = "window"
    """Those of the newest tokens."""
    ALL = "all"
    """Every one; scores add up from chunk to chunk."""


@dataclass(frozen=True)
class Scorer:
    """A function from a layer's queries and keys to scores, and its properties."""

    function: Callable[..., Any] | str
    """A ``scorers.ScoreFunction``, or the ``module:name`` of one: what is built
    in is imported when it is called, for policies are read without torch."""
    queries: Queries
    is_same_for_all_heads: bool = False
    """Whether it gives all heads, on all ranks, one score a token."""
    is_pooled: bool = False
    """Whether ``pooling`` is applied to its scores."""
    scores_groups: bool = False
    """Whether it may score groups of generated tokens too: only what is tested there
    may."""

    def __post_init__(self) -> None:
        if self.is_pooled and self.queries is Queries.ALL:
            raise ValueError("is_pooled is True: scores that add up are never pooled")

    def __call__(self, inputs: Any, config: Any) -> Any:
        """Scores, as ``scorers.ScoreFunction`` says."""
        return self._loaded(inputs, config)

    @cached_property
    def _loaded(self) -> Callable[..., Any]:
        function = self.function
        return _named(function) if isinstance(function, str) else function


def scorer(
    queries: Queries, *, is_same_for_all_heads: bool = False, is_pooled: bool = False
) -> Callable[[Callable[..., Any]], Scorer]:
    """Decorator that makes a scorer of a ``scorers.ScoreFunction``.

    Args:
        queries: which queries it reads.
        is_same_for_all_heads: see ``Scorer``.
        is_pooled: see ``Scorer``.
    """

    def decorate(function: Callable[..., Any]) -> Scorer:
        return Scorer(function, queries, is_same_for_all_heads, is_pooled)

    return decorate


_HERE = "pyramid_vllm.scorers"

#: What is built in; another one is a line here, or none: see ``find_scorer``.
SCORERS: dict[str, Scorer] = {
    "attention": Scorer(
        f"{_HERE}:attention", Queries.WINDOW, is_pooled=True, scores_groups=True
    ),
    "accumulated": Scorer(f"{_HERE}:accumulated", Queries.ALL),
    "key_norm": Scorer(f"{_HERE}:key_norm", Queries.NONE),
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
    """A scorer that is built in, an entry point's, or ``module:name``.

    Raises:
        ValueError: there is none of that name, or it is no scorer.
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
