"""The pieces of the check. Each runs in a process of its own.

A kernel that fails may leave a GPU's context unusable, or end its process. The next
piece therefore gets another process.
"""

from __future__ import annotations

import importlib
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from gpu_check.loading import Skip, load_package

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
#: Statuses of figures: their goal is met or missed, or they have none.
MET, MISSED, MEASURED = "met", "missed", "measured"


@dataclass(frozen=True)
class Options:
    """What every piece gets."""

    quick: bool = False
    seed: int = 0
    on_cpu: bool = False
    """Whether engines run on the CPU as on a GPU: to test the pieces themselves."""
    kernels: list[str] = field(default_factory=list)
    """Kernels that are compared; an empty list means all."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    status: str
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Piece:
    """What a piece has found."""

    name: str
    status: str = OK
    why: str = ""
    """The reason why the piece was skipped or ended early."""
    traceback: str = ""
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)


def guarded(name: str, run: Callable[[], Check]) -> Check:
    """Run one check; an exception fails this check alone."""
    try:
        return run()
    except Skip as skip:
        return Check(name, SKIPPED, str(skip))
    except Exception as error:
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(name, FAILED, detail, {"traceback": traceback.format_exc()})


def run_piece(
    name: str, options: Options, timeout: float, environment: dict[str, str]
) -> Piece:
    """Run a piece in a process of its own; its checks before a failure are kept."""
    load_package()
    from pyramid_vllm.tools.engine_process import run_child

    piece, start = Piece(name), time.perf_counter()

    def hear(message: dict[str, Any]) -> None:
        if "check" in message:
            piece.checks.append(Check(**message["check"]))
        else:
            vars(piece).update(message["result"])

    task = {"name": name, "options": asdict(options)}
    variables = os.environ | environment
    try:
        run_child("gpu_check.pieces", task, hear, variables, timeout=timeout)
    except RuntimeError as error:
        piece.status = FAILED
        piece.why, _, piece.traceback = str(error).partition("\n")
    if any(check.status == FAILED for check in piece.checks):
        piece.status = FAILED
    piece.seconds = round(time.perf_counter() - start, 1)
    return piece


def main() -> None:
    """The process of a piece."""
    load_package()
    from pyramid_vllm.tools.engine_process import leave, read_task, tell

    task = read_task()

    def run() -> Check:
        # Imported here, so that a module that cannot be imported is a failed piece.
        module = importlib.import_module(f"gpu_check.{task['name']}")
        for check in module.run(Options(**task["options"])):
            tell("check", asdict(check))
        return Check(task["name"], OK)

    ended = guarded(task["name"], run)
    tell("result", {"status": ended.status, "why": ended.detail} | ended.figures)
    leave()


if __name__ == "__main__":
    main()
