"""Loads: sessions of one or more turns, which a seed draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

_VOCABULARY = 32_000
#: Separates the sources of a session's own pieces from those of shared pieces.
_OWN = 1 << 32

Piece = tuple[int, int]
"""A run of tokens: what it is drawn from, and its length. Equal ones are equal."""


@dataclass(frozen=True)
class Turn:
    """One request of a session."""

    pieces: tuple[Piece, ...]
    """Tokens that it adds to the session before its answer."""
    num_outputs: int
    wait: float = 0.0
    """Seconds from the answer before it: a person who thinks, a tool that runs."""

    @property
    def num_tokens(self) -> int:
        """Tokens that it adds to the prompt."""
        return sum(length for _, length in self.pieces)


@dataclass(frozen=True)
class Session:
    """Turns that each start with all tokens of those before them."""

    turns: tuple[Turn, ...]
    arrival: float = 0.0
    """Seconds; not read where a number of clients sends the sessions."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the last request, with its answer."""
        return sum(turn.num_tokens + turn.num_outputs for turn in self.turns)


@dataclass(frozen=True)
class Load:
    """The sessions that an engine gets."""

    name: str
    sessions: tuple[Session, ...]
    num_clients: int | None = None
    """Sessions at once, the next one sent when one ends; None: by arrival."""

    @property
    def num_requests(self) -> int:
        """Turns of all sessions."""
        return sum(len(session.turns) for session in self.sessions)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its answer included."""
        return max(session.num_tokens for session in self.sessions)

    def scaled(self, speed: float) -> Load:
        """The same with arrivals ``speed`` times as fast."""
        sessions = tuple(
            replace(session, arrival=session.arrival / speed)
            for session in self.sessions
        )
        return replace(self, sessions=sessions)

    @property
    def rate(self) -> float:
        """Sessions a second, from the first arrival to the last; 0: all at once."""
        arrivals = [session.arrival for session in self.sessions]
        span = max(arrivals) - min(arrivals)
        return (len(arrivals) - 1) / span if span > 0 else 0.0


@lru_cache(maxsize=4096)
def piece_tokens(piece: Piece) -> tuple[int, ...]:
    """A piece's token ids."""
    source, length = piece
    # Philox's raw output: a generator's distributions may change with NumPy's version.
    raw = np.random.Philox(key=source).random_raw(length)
    return tuple((raw % _VOCABULARY).tolist())


@dataclass(frozen=True)
class LoadSettings:
    """Parameters of a named load. Lengths are in tokens, times in seconds."""

    num_requests: int = 200
    """Requests, or sessions where these have several turns."""
    prompt_tokens: int = 1024
    """Tokens that each turn adds and that only its session has."""
    output_tokens: int = 256
    """Tokens of each answer."""
    shared_prefix: int = 0
    """Tokens that sessions start with and have in common."""
    num_prefixes: int = 1
    """Different ones; session i starts with number i modulo this."""
    turns: int = 1
    think_time: float = 0.0
    """Mean time from an answer to the next turn, drawn from an exponential
    distribution."""
    spread: float = 0.0
    """Lengths of turns and answers are uniform within this share of theirs, below 1."""
    rate: float | None = None
    """Sessions a second, a Poisson process; None: all at once."""
    clients: int | None = None
    """Sessions at once, in the place of ``rate``."""
    seed: int = 0


#: Defaults of the named loads.
NAMED = {
    "unshared": LoadSettings(),
    "shared": LoadSettings(shared_prefix=16384, prompt_tokens=512),
    "documents": LoadSettings(shared_prefix=16384, prompt_tokens=512, num_prefixes=10),
    "chat": LoadSettings(
        num_requests=100,
        shared_prefix=512,
        prompt_tokens=200,
        output_tokens=300,
        turns=8,
        think_time=30.0,
        spread=0.8,
    ),
    # Peers report a median of 43 turns and 142k tokens in for 444 out a session.
    "agent": LoadSettings(
        num_requests=40,
        shared_prefix=8192,
        prompt_tokens=1500,
        output_tokens=100,
        turns=40,
        think_time=2.0,
        spread=0.8,
    ),
    "reasoning": LoadSettings(prompt_tokens=512, output_tokens=8192, spread=0.5),
}


def named_load(name: str, changes: dict[str, Any]) -> Load:
    """A load of ``NAMED``, with other settings than its defaults; ``ValueError`` if
    there is none, or it has both a rate and clients."""
    if name not in NAMED:
        raise ValueError(f"--load is '{name}': valid is one of {', '.join(NAMED)}")
    settings = replace(NAMED[name], **changes)
    if settings.rate is not None and settings.clients is not None:
        raise ValueError(
            f"--rate is {settings.rate:g} and --clients is {settings.clients}: valid "
            "is one of the two"
        )
    return Load(name, tuple(_sessions(settings)), settings.clients)


def _sessions(settings: LoadSettings) -> Iterator[Session]:
    rng = np.random.default_rng(settings.seed)
    arrival, own = 0.0, _OWN * (1 + settings.seed)
    for index in range(settings.num_requests):
        if settings.rate is not None and index:
            arrival += float(rng.exponential(1 / settings.rate))
        turns = []
        for number in range(settings.turns):
            pieces: tuple[Piece, ...] = (
                (own, _length(rng, settings.prompt_tokens, settings.spread)),
            )
            own += 1
            if number == 0 and settings.shared_prefix:
                prefix = 1 + index % settings.num_prefixes
                pieces = ((prefix, settings.shared_prefix), *pieces)
            wait = float(rng.exponential(settings.think_time)) if number else 0.0
            outputs = _length(rng, settings.output_tokens, settings.spread)
            turns.append(Turn(pieces, outputs, wait))
        yield Session(tuple(turns), arrival)


def _length(rng: np.random.Generator, middle: int, spread: float) -> int:
    low, high = round(middle * (1 - spread)), round(middle * (1 + spread))
    return max(1, int(rng.integers(low, high + 1)))
