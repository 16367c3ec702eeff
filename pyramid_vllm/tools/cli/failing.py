"""Commands whose options are a dataclass's fields; errors that the user can mend."""

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, get_type_hints

import typer
from rich.console import Console

_errors = Console(stderr=True)
_Result = TypeVar("_Result")
_Settings = TypeVar("_Settings")


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


def command(
    settings: Callable[..., _Settings], run: Callable[[_Settings], None]
) -> Callable[..., None]:
    """A command that makes its settings from its options and runs with them.

    Args:
        settings: a dataclass; each field is an option, declared in its annotation.
            Its docstring is the command's help.
        run: what the command does; ``fail`` ends it with what is the user's to mend.
    """

    def action(**options: Any) -> None:
        or_fail(lambda: run(settings(**options)))

    action.__doc__ = settings.__doc__
    action.__annotations__ = get_type_hints(settings, include_extras=True)
    vars(action)["__signature__"] = inspect.signature(settings)
    return action
