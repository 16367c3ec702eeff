"""Commands whose options are a dataclass's fields; errors that the user can mend."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

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


def command(settings: type[Any], run: Callable[[Any], None]) -> Callable[..., None]:
    """A command that makes its settings from its options and runs with them.

    Args:
        settings: a dataclass whose fields are made by ``tools.options``; its docstring
            is the command's help.
        run: what the command does; errors that the user can mend end it.
    """

    def action(**options: Any) -> None:
        or_fail(lambda: run(settings(**options)))

    types = get_type_hints(settings)
    for field in fields(settings):
        types[field.name] = Annotated[types[field.name], field.metadata["option"]]
    signature = inspect.signature(settings)
    parameters = [
        part.replace(annotation=types[name])
        for name, part in signature.parameters.items()
    ]
    action.__doc__, action.__annotations__ = settings.__doc__, types
    vars(action)["__signature__"] = signature.replace(parameters=parameters)
    return action
