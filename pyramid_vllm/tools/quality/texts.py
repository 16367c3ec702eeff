"""Windows of a text: a prefix to keep or evict, and the tokens that follow it."""

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

#: A run of a text's tokens: a prefix, and the tokens that follow it.
Window = tuple[list[int], list[int]]


def python_manual() -> str:
    """Real text that every Python carries: the language reference of ``pydoc``."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_part(path: Path, begin: float = 0.0, end: float = 1.0) -> str:
    """A share of a UTF-8 file, by characters, so that splits have none in common.

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
    """Evenly spread windows of a text's tokens, none of which overlap.

    Raises:
        ValueError: the text, ``source``, is too short.
    """
    length = prefix_tokens + target_tokens
    if len(ids) < num_windows * length:
        raise ValueError(
            f"{source} has {len(ids)} tokens: {num_windows} windows of "
            f"{prefix_tokens} + {target_tokens} tokens need {num_windows * length}; "
            f"valid is up to {len(ids) // length} windows"
        )
    stride = len(ids) // num_windows
    parts = [
        list(ids[start : start + length])
        for start in range(0, num_windows * stride, stride)
    ]
    return [(part[:prefix_tokens], part[prefix_tokens:]) for part in parts]
