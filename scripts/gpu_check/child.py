"""The process of one piece."""

import importlib
import json
import sys
from dataclasses import asdict

from gpu_check.pieces import Options, run_here, write_result


def main() -> None:
    """Entry point of the child process."""
    task = json.load(sys.stdin)
    name = task["name"]

    def run(options: Options):  # type: ignore[no-untyped-def]
        # Here, so that a module that cannot be imported is a failed piece.
        yield from importlib.import_module(f"gpu_check.{name}").run(options)

    write_result(asdict(run_here(name, run, Options(**task["options"]))))


if __name__ == "__main__":
    main()
