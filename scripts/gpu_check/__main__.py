"""Runs the pieces, prints the table, writes JSON."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_check.loading import KNOWN, has_gpu
from gpu_check.pieces import FAILED, SKIPPED, Options, Piece, run_piece

#: Pieces in their order, and the seconds after which each is stopped.
PIECES = {
    "environment": 300,
    "kernels": 3600,
    "bandwidth": 1800,
    "engine": 4 * 3600,
    "bench": 6 * 3600,
}


def _listed(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def options_of(arguments: list[str]) -> tuple[list[str], Path | None, Options]:
    """Names of pieces, the JSON file, and the options of the pieces."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description="Check and measure the plugin on a machine with an NVIDIA GPU. "
        "Ends with 1 if anything failed; skipped pieces and missed goals are no "
        "failures.",
    )
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    parser.add_argument(
        "--only",
        type=_listed,
        default=",".join(PIECES),
        help="pieces to run, by commas; default: %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="fewer variants")
    parser.add_argument(
        "--kernels",
        type=_listed,
        default="",
        help="kernels to compare, by commas; default: all",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--on-cpu",
        action="store_true",
        help="for developers: engines on the CPU, set up as on a GPU",
    )
    found = vars(parser.parse_args(arguments))
    names, json_file = found.pop("only"), found.pop("json")
    if unknown := [name for name in names if name not in PIECES]:
        parser.error(f"--only has '{unknown[0]}': valid are {', '.join(PIECES)}")
    return [name for name in PIECES if name in names], json_file, Options(**found)


def lines_of(piece: Piece) -> list[str]:
    """Lines of the table for a piece, as plain text."""
    why = f": {piece.why}" if piece.why else ""
    wide = max([40, *(len(check.name) for check in piece.checks)])
    return [
        f"{piece.name}: {piece.status}{why} ({piece.seconds:g} s)",
        *(
            f"  {check.name:<{wide}}  {check.status:<8}  {check.detail}"
            for check in piece.checks
        ),
    ]


def skipped(pieces: list[Piece]) -> list[dict[str, str]]:
    """Everything that did not run, and the reason."""
    ran = {piece.name for piece in pieces}
    found = [(name, "not in --only") for name in PIECES if name not in ran]
    found += [(piece.name, piece.why) for piece in pieces if piece.status == SKIPPED]
    found += [
        (f"{piece.name}, {check.name}", check.detail)
        for piece in pieces
        for check in piece.checks
        if check.status == SKIPPED
    ]
    return [{"what": what, "why": why} for what, why in found]


def main() -> None:
    """Entry point."""
    names, json_file, options = options_of(sys.argv[1:])
    environment = {KNOWN: str(int(has_gpu()))}
    if not has_gpu():
        # Triton has to see this when it is imported; then kernels run interpreted.
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
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": asdict(options),
            "pieces": {piece.name: asdict(piece) for piece in pieces},
            "skipped": skipped(pieces),
            "failed": failed,
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written: {json_file}")
    sys.stdout.flush()
    # Threads of drivers need not be joined.
    os._exit(failed)


if __name__ == "__main__":
    main()
