"""Loads from traces in Mooncake's form (Qin et al., FAST 2025)."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from pyramid_vllm.tools.json_settings import explained
from pyramid_vllm.tools.simulate.loads import Load, Session, Turn

#: Tokens of an entry of ``hash_ids``.
TRACE_BLOCK = 512


class _TraceRow(BaseModel):
    """A line of a trace."""

    model_config = ConfigDict(strict=True)

    timestamp: NonNegativeFloat
    """Milliseconds."""
    input_length: PositiveInt
    output_length: NonNegativeInt
    hash_ids: list[NonNegativeInt]

    @model_validator(mode="after")
    def _covers_its_prompt(self) -> _TraceRow:
        needed = -(-self.input_length // TRACE_BLOCK)
        if len(self.hash_ids) < needed:
            raise ValueError(
                f"hash_ids does not cover input_length, {self.input_length}: valid are "
                f"{needed} ids"
            )
        return self

    def session(self) -> Session:
        """Its request."""
        starts = range(0, self.input_length, TRACE_BLOCK)
        pieces = tuple(
            (of_block, min(TRACE_BLOCK, self.input_length - start))
            for of_block, start in zip(self.hash_ids, starts, strict=False)
        )
        # vLLM generates at least one token.
        turn = Turn(pieces, max(1, self.output_length))
        return Session((turn,), self.timestamp / 1000)


def read_trace(file: Path, limit: int | None) -> Load:
    """A trace: JSON lines with ``timestamp`` in ms, ``input_length``, ``output_length``
    and ``hash_ids``, one for each 512 tokens of the prompt; equal ids are equal
    tokens.

    Args:
        file: the trace.
        limit: most requests, from the first one on; None: all.

    Raises:
        ValueError: a line is not of that form; names the file, the line and why.
        OSError: the file cannot be read.
    """
    sessions: list[Session] = []
    with file.open(encoding="utf-8") as lines:
        full = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
        for number, line in islice(full, limit):
            try:
                sessions.append(_TraceRow.model_validate_json(line).session())
            except ValidationError as error:
                raise ValueError(
                    f"--trace {file}, line {number}: {explained(error)}; valid is an "
                    "object with timestamp, input_length, output_length and hash_ids"
                ) from None
    if not sessions:
        raise ValueError(f"--trace {file} has no requests: valid is one or more")
    start = min(session.arrival for session in sessions)
    shifted = [replace(s, arrival=s.arrival - start) for s in sessions]
    # Lines of traces may not be in order.
    return Load(file.name, tuple(sorted(shifted, key=lambda s: s.arrival)))
