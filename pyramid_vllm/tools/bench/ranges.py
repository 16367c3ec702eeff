"""Lengths and memory as options give them."""

import math
from dataclasses import dataclass

from pyramid_vllm.tools.sizes import BYTES, quantity


@dataclass(frozen=True)
class TokenRange:
    """Lengths between two bounds, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, option: str, text: str, least: int) -> "TokenRange":
        """Read ``512`` or ``512-2048``; ``ValueError`` if it is neither, or below
        ``least``."""
        low, _, high = text.partition("-")
        try:
            found = cls(int(low), int(high or low))
        except ValueError:
            found = cls(0, 0)
        if not least <= found.low <= found.high:
            raise ValueError(
                f"{option} is '{text}': valid is a number or a range like 512-2048, "
                f"from {least} on"
            )
        return found


def memory_bytes(text: str, sequence_pages: int, page_bytes: int) -> int:
    """Bytes of ``80MiB``, or of ``4x``: stock sequences of the longest request.

    Args:
        text: a value of ``--kv-memory``.
        sequence_pages: pages of the longest request in stock vLLM.
        page_bytes: bytes of such a page.

    Raises:
        ValueError: the text is neither.
    """
    if num_bytes := int(quantity(text, BYTES)):
        return num_bytes
    num_sequences = quantity(text, {"x": 1.0})
    if not num_sequences:
        raise ValueError(
            f"--kv-memory is '{text}': valid are bytes, a number with KiB, MiB or GiB, "
            "or stock sequences of the longest request like 4x"
        )
    pages = math.ceil(num_sequences * sequence_pages) + 1  # the null page
    return pages * page_bytes
