"""Pieces of the check: what they find, and how each runs in a process of its own.

A kernel that fails may leave a GPU's context unusable, or end its process: the next
piece has another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, SKIPPED = "ok", "failed", "skipped"
#: Figures: of a goal that is met or missed, or of none.
MET, MISSED, MEASURED = "met", "missed", "measured"
_TAIL_CHARS = 4000


class Skip(Exception):
    """Something cannot run here; the message says why."""


@dataclass(frozen=True)
class Options:
    """What every piece is told."""

    quick: bool = False
    seed: int = 0
    on_cpu: bool = False
    """Whether engines run on the CPU as on a GPU: to test the pieces themselves."""
    kernels: list[str] = field(default_factory=list)
    """Those that are compared; none: all."""
    argv: list[str] = field(default_factory=list)
    """The command."""


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
    """Of a piece that was skipped or that ended early."""
    traceback: str = ""
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)

    @classmethod
    def of(cls, found: dict[str, Any]) -> Piece:
        """From its ``asdict``."""
        checks = [Check(**check) for check in found.pop("checks")]
        return cls(**found, checks=checks)


Run = Callable[[Options], Iterator[Check]]


def run_here(name: str, run: Run, options: Options) -> Piece:
    """Run a piece in this process; what it found before an exception is kept."""
    piece, start = Piece(name), time.perf_counter()
    try:
        for check in run(options):
            piece.checks.append(check)
            print(f"  {check.name}: {check.status}", file=sys.stderr, flush=True)
    except Skip as skip:
        piece.status, piece.why = SKIPPED, str(skip)
    except Exception as error:
        piece.status = FAILED
        piece.why = f"{type(error).__name__}: {error}".splitlines()[0]
        piece.traceback = traceback.format_exc()
    if any(check.status == FAILED for check in piece.checks):
        piece.status = FAILED
    piece.seconds = round(time.perf_counter() - start, 1)
    return piece


def guarded(name: str, run: Callable[[], Check]) -> Check:
    """One check; an exception fails it alone."""
    try:
        return run()
    except Skip as skip:
        return Check(name, SKIPPED, str(skip))
    except Exception as error:
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(name, FAILED, detail, {"traceback": traceback.format_exc()})


def call_child(
    module: str,
    task: dict[str, Any],
    timeout: float,
    environment: dict[str, str] | None = None,
) -> Any:
    """Run ``python -m module``: a task as JSON on its input, a result in a file.

    Raises:
        RuntimeError: it ended without a result, or ran longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        with Path(folder, "stderr").open("w+", encoding="utf-8") as log:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", module, str(result)],
                    input=json.dumps(task),
                    stdout=log,
                    stderr=log,
                    timeout=timeout,
                    env=os.environ | (environment or {}),
                    text=True,
                    check=False,
                )
                ended = f"ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"ran longer than {timeout:.0f} s"
            if result.exists():
                return json.loads(result.read_text(encoding="utf-8"))
            log.seek(0)
            raise RuntimeError(f"{module} {ended}:\n{log.read()[-_TAIL_CHARS:]}")


def run_child(
    name: str, options: Options, timeout: float, environment: dict[str, str]
) -> Piece:
    """Run a piece in a process of its own."""
    task = {"name": name, "options": asdict(options)}
    start = time.perf_counter()
    try:
        return Piece.of(call_child("gpu_check.child", task, timeout, environment))
    except RuntimeError as error:
        why, _, tail = str(error).partition("\n")
        seconds = round(time.perf_counter() - start, 1)
        return Piece(name, FAILED, why, tail, seconds)


def write_result(result: Any) -> None:
    """A child's side of ``call_child``; whole or not at all."""
    target = Path(sys.argv[1])
    part = target.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.rename(target)
