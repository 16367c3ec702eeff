"""Runs the pieces, prints the table, writes JSON."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_check.loading import KNOWN, has_gpu
from gpu_check.pieces import FAILED, SKIPPED, Options, Piece, run_piece

#: Pieces in their order, and after how many seconds each is ended.
PIECES = {
    "environment": 300,
    "kernels": 3600,
    "bandwidth": 1800,
    "engine": 4 * 3600,
    "bench": 6 * 3600,
}
_WIDTH = 40


def options_of(arguments: list[str]) -> tuple[list[str], Path | None, Options]:
    """Names of pieces, the JSON's file, and the options of the pieces."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description="Check and measure the plugin on a machine with an NVIDIA GPU. "
        "Ends with 1 if anything failed; skipped pieces and missed goals are no "
        "failures.",
    )
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    parser.add_argument(
        "--only",
        default=",".join(PIECES),
        help="pieces to run, by commas; default: %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="fewer variants")
    parser.add_argument(
        "--kernels", default="", help="kernels to compare, by commas; default: all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--on-cpu",
        action="store_true",
        help="for developers: engines on the CPU, set up as on a GPU",
    )
    found = parser.parse_args(arguments)
    names = found.only.split(",")
    for name in names:
        if name not in PIECES:
            parser.error(f"--only has '{name}': valid are {', '.join(PIECES)}")
    kernels = [name for name in found.kernels.split(",") if name]
    options = Options(found.quick, found.seed, found.on_cpu, kernels, arguments)
    return [name for name in PIECES if name in names], found.json, options


def lines_of(piece: Piece) -> list[str]:
    """A piece of the table, as plain text."""
    why = f": {piece.why}" if piece.why else ""
    lines = [f"{piece.name}: {piece.status}{why} ({piece.seconds:g} s)"]
    wide = max([_WIDTH, *(len(check.name) for check in piece.checks)])
    for check in piece.checks:
        lines.append(f"  {check.name:<{wide}}  {check.status:<8}  {check.detail}")
    return lines


def skipped(pieces: list[Piece]) -> list[dict[str, str]]:
    """All that did not run, and why."""
    ran = {piece.name for piece in pieces}
    found = [{"what": n, "why": "not in --only"} for n in PIECES if n not in ran]
    found += [{"what": p.name, "why": p.why} for p in pieces if p.status == SKIPPED]
    for piece in pieces:
        found += [
            {"what": f"{piece.name}, {check.name}", "why": check.detail}
            for check in piece.checks
            if check.status == SKIPPED
        ]
    return found


def main() -> None:
    """Entry point."""
    names, json_file, options = options_of(sys.argv[1:])
    environment = {KNOWN: str(int(has_gpu()))}
    if not has_gpu():
        # Before Triton is imported, so that kernels run all the same.
        environment["TRITON_INTERPRET"] = "1"
    pieces = []
    for name in names:
        print(f"running {name} ...", file=sys.stderr, flush=True)
        pieces.append(run_piece(name, options, PIECES[name], environment))
        print(*lines_of(pieces[-1]), sep="\n", flush=True)
    for line in skipped(pieces):
        print(f"skipped: {line['what']}: {line['why']}")
    failed = any(piece.status == FAILED for piece in pieces)
    if json_file is not None:
        report: dict[str, Any] = {
            "argv": sys.argv,
            "options": asdict(options),
            "pieces": {piece.name: asdict(piece) for piece in pieces},
            "skipped": skipped(pieces),
            "failed": failed,
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written: {json_file}")
    sys.stdout.flush()
    # The drivers' threads need no end of their own.
    os._exit(failed)


if __name__ == "__main__":
    main()
