"""Lengths and memory as options give them."""

import math
from dataclasses import dataclass

from pyramid_vllm.tools.sizes import parse_bytes


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


@dataclass(frozen=True)
class KVMemory:
    """A point of the sweep, in bytes or in stock sequences of the longest request."""

    label: str
    num_bytes: int = 0
    num_sequences: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "KVMemory":
        """Read ``80MiB`` or ``4x``; ``ValueError`` if it is neither."""
        label = text.strip()
        try:
            if not label.lower().endswith("x"):
                return cls(label, num_bytes=parse_bytes(label))
            sequences = float(label[:-1])
        except ValueError:
            sequences = 0.0
        if not 0 < sequences < math.inf:
            raise ValueError(
                f"--kv-memory is '{text}': valid are bytes, a number with KiB, MiB or "
                "GiB, or stock sequences of the longest request like 4x"
            )
        return cls(label, num_sequences=sequences)

    def resolve(self, sequence_pages: int, page_bytes: int) -> int:
        """Bytes, given the pages of the longest request in stock vLLM."""
        pages = math.ceil(self.num_sequences * sequence_pages) + 1  # the null page
        return self.num_bytes or pages * page_bytes
