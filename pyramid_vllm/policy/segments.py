"""Segments: fixed stretches of a sequence, each compressed once, by position alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pyramid_vllm.policy.budgets.base import UNIT

Counts = tuple[int, ...]


def kept_of_segment(size: int, page: int, shares: Sequence[int]) -> Counts:
    """Tokens that each tier keeps of a segment: whole pages, at least one.

    Args:
        size: tokens of a segment, a multiple of ``page``.
        page: tokens of a page.
        shares: of each tier, in billionths.
    """
    most = size // page
    pages = [(2 * most * share + UNIT) // (2 * UNIT) for share in shares]
    return tuple(page * min(most, max(1, count)) for count in pages)


@dataclass(frozen=True)
class Segments:
    """Counts of a sequence whose segments are compressed one by one.

    Segment ``k`` holds the tokens from ``k * size`` on. It is compressed in the step
    that computes the last of the ``recent`` tokens after it, prompt or output, and
    never again. What is newer is kept whole.
    """

    size: int
    """Tokens of a segment."""
    recent: int
    """Tokens that must be computed after a segment before it is compressed."""
    kept: Counts
    """Tokens that each tier keeps of a segment."""

    @cached_property
    def evicted(self) -> Counts:
        """Tokens that each tier evicts from a segment."""
        return tuple(self.size - kept for kept in self.kept)

    def num_compressed(self, num_tokens: int) -> int:
        """Segments that are compressed once ``num_tokens`` tokens are computed."""
        return max(0, num_tokens - self.recent) // self.size

    def end(self, segment: int) -> int:
        """Number of computed tokens at which a segment is compressed."""
        return (segment + 1) * self.size + self.recent

    def next_end(self, num_tokens: int) -> int:
        """Number of computed tokens, above ``num_tokens``, at which the next segment is
        compressed."""
        return self.end(self.num_compressed(num_tokens))

    def num_evicted(self, num_segments: int) -> Counts:
        """Evicted tokens of each tier once ``num_segments`` are compressed."""
        return tuple(num_segments * count for count in self.evicted)

    def held(self, num_tokens: int) -> Counts:
        """Tokens that each tier holds after the step that computed the last of
        ``num_tokens``."""
        evicted = self.num_evicted(self.num_compressed(num_tokens))
        return tuple(num_tokens - count for count in evicted)

    def peak(self, num_tokens: int) -> Counts:
        """Most tokens that each tier holds during or after any step up to
        ``num_tokens`` computed tokens."""
        last = self.num_compressed(num_tokens) - 1
        held = self.held(num_tokens)
        if last < 0:
            return held
        before = self.end(last)
        evicted = self.num_evicted(last)
        return tuple(
            max(count, before - gone) for count, gone in zip(held, evicted, strict=True)
        )
