"""Loads: sessions of one or more turns, drawn by a seed or read from a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from pyramid_vllm.tools.json_settings import first_problem

#: Tokens of an entry of ``hash_ids`` in Mooncake's traces.
TRACE_BLOCK = 512
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


def piece_tokens(piece: Piece) -> list[int]:
    """A piece's token ids."""
    return list(_drawn(*piece))


@lru_cache(maxsize=4096)
def _drawn(source: int, length: int) -> tuple[int, ...]:
    # Philox's raw output: a generator's distributions may change with NumPy's version.
    raw = np.random.Philox(key=source).random_raw(length)
    return tuple((raw % _VOCABULARY).tolist())


class LoadSettings(BaseModel):
    """Parameters of a named load. Lengths are in tokens, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_requests: PositiveInt = 200
    """Requests, or sessions where these have several turns."""
    prompt_tokens: PositiveInt = 1024
    """Tokens that each turn adds and that only its session has."""
    output_tokens: PositiveInt = 256
    """Tokens of each answer."""
    shared_prefix: NonNegativeInt = 0
    """Tokens that sessions start with and have in common."""
    num_prefixes: PositiveInt = 1
    """Different ones; session i starts with number i modulo this."""
    turns: PositiveInt = 1
    think_time: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Mean time from an answer to the next turn, drawn from an exponential
    distribution."""
    spread: float = Field(0.0, ge=0, lt=1)
    """Lengths of turns and answers are uniform within this share of theirs."""
    rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Sessions a second, a Poisson process; None: all at once."""
    clients: PositiveInt | None = None
    """Sessions at once, in the place of ``rate``."""
    seed: NonNegativeInt = 0


#: Defaults of the named loads.
NAMED: dict[str, dict[str, Any]] = {
    "unshared": {},
    "shared": {"shared_prefix": 16384, "prompt_tokens": 512},
    "documents": {"shared_prefix": 16384, "prompt_tokens": 512, "num_prefixes": 10},
    "chat": {
        "num_requests": 100,
        "shared_prefix": 512,
        "prompt_tokens": 200,
        "output_tokens": 300,
        "turns": 8,
        "think_time": 30.0,
        "spread": 0.8,
    },
    # Peers report a median of 43 turns and 142k tokens in for 444 out a session.
    "agent": {
        "num_requests": 40,
        "shared_prefix": 8192,
        "prompt_tokens": 1500,
        "output_tokens": 100,
        "turns": 40,
        "think_time": 2.0,
        "spread": 0.8,
    },
    "reasoning": {"prompt_tokens": 512, "output_tokens": 8192, "spread": 0.5},
}


def named_load(name: str, changes: dict[str, Any]) -> Load:
    """A load of ``NAMED``, with other settings than its defaults; ``ValueError`` names
    one that is not valid."""
    if name not in NAMED:
        raise ValueError(f"--load is '{name}': valid is one of {', '.join(NAMED)}")
    try:
        settings = LoadSettings.model_validate(NAMED[name] | changes)
    except ValidationError as error:
        setting, value, why = first_problem(error)
        valid = ", ".join(LoadSettings.model_fields)
        raise ValueError(
            f"load '{name}': setting '{setting}' is {value!r}: {why}; settings are "
            f"{valid}"
        ) from None
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


class _TraceRow(BaseModel):
    """A line of a trace."""

    model_config = ConfigDict(strict=True)

    timestamp: NonNegativeFloat
    """Milliseconds."""
    input_length: PositiveInt
    output_length: NonNegativeInt
    hash_ids: list[NonNegativeInt]


def read_trace(file: Path, limit: int | None, speed: float) -> Load:
    """A trace in Mooncake's form (Qin et al., FAST 2025): JSON lines with
    ``timestamp`` in ms, ``input_length``, ``output_length`` and ``hash_ids``, one for
    each 512 tokens of the prompt; equal ids are equal tokens.

    Args:
        file: the trace.
        limit: most requests, from the first one on; None: all.
        speed: arrivals are this many times as fast as the trace's.

    Raises:
        ValueError: a line is not of that form; names the file, the line and why.
        OSError: the file cannot be read.
    """
    sessions: list[Session] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(sessions) >= limit:
                break
            if not line.strip():
                continue
            try:
                sessions.append(_traced(line, speed))
            except ValueError as error:
                raise ValueError(
                    f"--trace {file}, line {number}: {error}; valid is an object with "
                    "timestamp, input_length, output_length and hash_ids"
                ) from None
    if not sessions:
        raise ValueError(f"--trace {file} has no requests: valid is one or more")
    start = min(session.arrival for session in sessions)
    shifted = [replace(s, arrival=s.arrival - start) for s in sessions]
    # Lines of traces may not be in order.
    return Load(file.name, tuple(sorted(shifted, key=lambda s: s.arrival)))


def _traced(line: str, speed: float) -> Session:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}")
    try:
        row = _TraceRow.model_validate(content)
    except ValidationError as error:
        name, value, why = first_problem(error)
        missing = name not in content and "." not in name
        text = f"no '{name}'" if missing else f"{name} is {value!r}: {why}"
        raise ValueError(text) from None
    prompt, needed = row.input_length, -(-row.input_length // TRACE_BLOCK)
    if len(row.hash_ids) < needed:
        raise ValueError(
            f"hash_ids does not cover input_length, {prompt}: valid are {needed} ids"
        )
    pieces = tuple(
        (of_block, min(TRACE_BLOCK, prompt - index * TRACE_BLOCK))
        for index, of_block in enumerate(row.hash_ids[:needed])
    )
    # vLLM generates at least one token.
    turn = Turn(pieces, max(1, row.output_length))
    return Session((turn,), row.timestamp / 1000 / speed)
