"""All cases, and a few of them."""

from __future__ import annotations

from itertools import chain

from tests.parity import moves, rows, scores
from tests.parity.compared import Case


def all_cases(device: str, seed: int = 0) -> list[Case]:
    """Cases of every kernel; on a GPU also those that are too long to interpret."""
    parts = (scores, moves, rows)
    return list(chain.from_iterable(part.cases(device, seed) for part in parts))


def some_of(cases: list[Case]) -> list[Case]:
    """One in seven of each kernel's cases.

    No dimension of a kernel's cases has a multiple of seven values, so that what is
    taken has different values of all of them.
    """
    by_kernel: dict[str, list[Case]] = {}
    for case in cases:
        by_kernel.setdefault(case.kernel, []).append(case)
    return list(chain.from_iterable(group[::7] for group in by_kernel.values()))
