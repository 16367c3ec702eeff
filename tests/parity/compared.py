"""A kernel's result beside its reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Compared:
    """How far two results are apart."""

    is_same: bool
    max_error: float
    """Largest absolute difference."""
    max_relative: float
    num_values: int
    limit: str


@dataclass(frozen=True)
class Case:
    """One kernel in one variant."""

    kernel: str
    variant: str
    run: Callable[[], Compared]


def exactly(found: torch.Tensor, expected: torch.Tensor) -> Compared:
    """Compare bit by bit; both hold integers, bytes or copied values."""
    same = torch.equal(found, expected)
    errors = (found.double() - expected.double()).abs().nan_to_num(float("inf"))
    largest = errors.max().item() if errors.numel() else 0.0
    return Compared(same, largest, largest, found.numel(), "identical")


def within(
    found: torch.Tensor, expected: torch.Tensor, relative: float, absolute: float
) -> Compared:
    """Compare each value by itself."""
    same = torch.allclose(found, expected, rtol=relative, atol=absolute)
    errors = (found.double() - expected.double()).abs().nan_to_num(float("inf"))
    ratios = errors / expected.double().abs().clamp(min=absolute)
    largest = [part.max().item() if part.numel() else 0.0 for part in (errors, ratios)]
    limit = f"{relative:g} of the value + {absolute:g}"
    return Compared(same, *largest, found.numel(), limit)


def all_of(parts: list[Compared]) -> Compared:
    """The worst of some comparisons."""
    return Compared(
        all(part.is_same for part in parts),
        max(part.max_error for part in parts),
        max(part.max_relative for part in parts),
        sum(part.num_values for part in parts),
        parts[0].limit,
    )
