"""The process of one piece."""

import importlib
import traceback
from dataclasses import asdict

from gpu_check.loading import Skip, load_package
from gpu_check.pieces import FAILED, SKIPPED, Options


def main() -> None:
    """Entry point of the process of a piece."""
    load_package()
    from pyramid_vllm.tools.engine_process import leave, read_task, tell

    task = read_task()
    result: dict[str, str] = {}
    try:
        # Here, so that a module that cannot be imported is a failed piece.
        module = importlib.import_module(f"gpu_check.{task['name']}")
        for check in module.run(Options(**task["options"])):
            tell("check", asdict(check))
    except Skip as skip:
        result = {"status": SKIPPED, "why": str(skip)}
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        result = {"status": FAILED, "why": why, "traceback": traceback.format_exc()}
    tell("result", result)
    leave()


if __name__ == "__main__":
    main()
