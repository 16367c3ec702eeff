"""A kernel's result beside its reference's."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpu_check.pieces import FAILED, OK, Check


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
    """Bit by bit, where both are integers or bytes."""
    same = torch.equal(found, expected)
    errors = (found.double() - expected.double()).abs().nan_to_num(float("inf"))
    largest = errors.max().item() if errors.numel() else 0.0
    return Compared(same, largest, largest, found.numel(), "identical")


def within(
    found: torch.Tensor, expected: torch.Tensor, relative: float, absolute: float
) -> Compared:
    """Each value by itself."""
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


def _outcome(case: Case) -> dict[str, Any]:
    """What JSON says of a case; an exception fails it alone."""
    try:
        compared = case.run()
    except Exception:
        return {
            "variant": case.variant,
            "is_same": False,
            "traceback": traceback.format_exc(),
        }
    return {"variant": case.variant} | asdict(compared)


def check_all(cases: Iterable[Case]) -> Iterator[Check]:
    """A check for every kernel, over all of its variants."""
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        by_kernel.setdefault(case.kernel, []).append(_outcome(case))
    for kernel, outcomes in by_kernel.items():
        yield _check(kernel, outcomes)


def _check(kernel: str, outcomes: list[dict[str, Any]]) -> Check:
    wrong = [outcome for outcome in outcomes if not outcome["is_same"]]
    ran = [outcome for outcome in outcomes if "max_error" in outcome]
    figures: dict[str, Any] = {"variants": outcomes, "num_failed": len(wrong)}
    detail = f"{len(outcomes) - len(wrong)} of {len(outcomes)} variants"
    if ran:
        figures["max_error"] = max(outcome["max_error"] for outcome in ran)
        figures["max_relative"] = max(outcome["max_relative"] for outcome in ran)
        detail += f", largest error {figures['max_error']:.2g}"
        detail += f" (limit: {ran[0]['limit']})"
    if wrong:
        detail += f"; first to fail: {wrong[0]['variant']}"
        if "traceback" in wrong[0]:
            detail += f": {wrong[0]['traceback'].strip().splitlines()[-1]}"
    return Check(kernel, FAILED if wrong else OK, detail, figures)
