"""The input of a peer: it holds token ids, so that no tokenizer can differ."""

from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Lt, MinLen
from pydantic import (
    AfterValidator,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
)
from pydantic.dataclasses import dataclass

#: kvpress's classes by their names in the input.
PRESSES = {
    "snapkv": "SnapKVPress",
    "pyramidkv": "PyramidKVPress",
    "streaming_llm": "StreamingLLMPress",
    "expected_attention": "ExpectedAttentionPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
    "random": "RandomPress",
}
#: Scoring windows of kvpress's defaults have 64 tokens; a prompt has to be longer.
MIN_PROMPT = 65
_STRICT = ConfigDict(extra="forbid", strict=True)


def _folder(model: str) -> str:
    if not Path(model, "config.json").is_file():
        raise ValueError("valid is the folder of a model")
    return model


Prompt = Annotated[list[NonNegativeInt], MinLen(MIN_PROMPT)]


@dataclass(frozen=True, config=_STRICT)
class Window:
    """Text to score: loss of ``target`` after ``prompt``."""

    prompt: Prompt
    target: Annotated[list[NonNegativeInt], MinLen(1)]


@dataclass(frozen=True, config=_STRICT)
class Sample:
    """A prompt to answer greedily."""

    prompt: Prompt
    max_tokens: PositiveInt


@dataclass(frozen=True, config=_STRICT)
class Task:
    """The input."""

    model: Annotated[str, AfterValidator(_folder)]
    presses: dict[Literal[tuple(PRESSES)], Annotated[float, Gt(0), Lt(1)]]  # type: ignore[valid-type]
    """The share that each press keeps."""
    windows: list[Window]
    samples: list[Sample]
    seed: int


def read_task(text: str) -> Task:
    """Validate the input.

    Raises:
        ValueError: it is not valid; the message names key, value and valid values.
    """
    return TypeAdapter(Task).validate_json(text)
