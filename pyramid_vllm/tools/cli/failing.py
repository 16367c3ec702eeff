"""Errors that are the user's to mend end a command in one line."""

from collections.abc import Callable
from typing import NoReturn, TypeVar

import typer
from rich.console import Console

_errors = Console(stderr=True)
_Result = TypeVar("_Result")


def fail(error: Exception) -> NoReturn:
    """Print the error and end the command with status 2."""
    _errors.print(f"error: {error}", style="red", highlight=False, markup=False)
    raise typer.Exit(2)


def or_fail(action: Callable[[], _Result]) -> _Result:
    """Run an action; ``fail`` with what is the user's to mend."""
    try:
        return action()
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
