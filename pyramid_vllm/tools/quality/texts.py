"""Windows of a text: a prefix to keep or evict, and the tokens that follow it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Window:
    """A run of a text's tokens."""

    start: int
    """Position of its first token in the text."""
    prefix: tuple[int, ...]
    target: tuple[int, ...]
    """The tokens behind the prefix."""


def read_part(path: Path, begin: float = 0.0, end: float = 1.0) -> str:
    """A share of a text file, by characters, so that splits share none.

    Args:
        path: a UTF-8 file.
        begin: where the part begins, as a share of the file.
        end: where it ends.

    Raises:
        ValueError: the shares are not valid.
        OSError: the file cannot be read.
    """
    if not 0 <= begin < end <= 1:
        raise ValueError(
            f"text_from is {begin} and text_to is {end}: valid is "
            "0 <= text_from < text_to <= 1"
        )
    text = path.read_text(encoding="utf-8")
    return text[round(begin * len(text)) : round(end * len(text))]


def windows(
    ids: Sequence[int],
    prefix_tokens: int,
    target_tokens: int,
    num_windows: int,
    source: str = "the text",
) -> list[Window]:
    """Evenly spread windows, none of which overlap.

    Args:
        ids: the text's tokens.
        prefix_tokens: tokens of a window's prefix.
        target_tokens: tokens behind it.
        num_windows: how many.
        source: the text's name, for errors.

    Raises:
        ValueError: the text is too short.
    """
    for name, value in (
        ("prompt_tokens", prefix_tokens),
        ("target_tokens", target_tokens),
        ("windows", num_windows),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}: valid is 1 or more")
    length = prefix_tokens + target_tokens
    if len(ids) < num_windows * length:
        raise ValueError(
            f"{source} has {len(ids)} tokens: {num_windows} windows of "
            f"{prefix_tokens} + {target_tokens} tokens need {num_windows * length}; "
            f"valid is up to {len(ids) // length} windows"
        )
    stride = len(ids) // num_windows
    starts = range(0, num_windows * stride, stride)
    return [
        Window(
            start,
            tuple(ids[start : start + prefix_tokens]),
            tuple(ids[start + prefix_tokens : start + length]),
        )
        for start in starts
    ]
