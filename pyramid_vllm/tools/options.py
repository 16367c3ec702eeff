"""Commands whose options are the fields of a dataclass, declared there alone."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

import typer
from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError
from rich.console import Console

from pyramid_vllm.tools.json_settings import explained, json_object
from pyramid_vllm.tools.sizes import parse_bytes

_errors = Console(stderr=True)
_Result = TypeVar("_Result")

#: Settings whose options are read from text, as pydantic's dataclasses; a default may
#: be given as the option's text.
SETTINGS_CONFIG = ConfigDict(validate_default=True)


def option(default: Any, help: str | None = None, *names: str, **settings: Any) -> Any:
    """A field that is an option.

    Args:
        default: of the field.
        help: what ``--help`` shows.
        names: of the option, where it is not called as the field.
        settings: of typer's, such as ``min``.
    """
    made = typer.Option(*names, help=help, **settings)
    return field(default=default, metadata={"option": made})


def argument(help: str, **settings: Any) -> Any:
    """A field that is an argument of the command; ``settings`` may have a default."""
    return field(**settings, metadata={"option": typer.Argument(help=help)})


#: Help of options that several commands have.
MODEL = "A model's folder; default: the bundled one."
MODEL_NAME = "Folder or hub name; default: the bundled one."
POLICY = "A preset, a YAML file or inline JSON."
POLICIES = (
    "A preset, a YAML file or inline JSON; repeat it to compare more. Stock vLLM is "
    "always there."
)
OVERRIDES = "Settings that replace it, as JSON."
POLICY_OVERRIDES = "Settings that replace the policy's, as JSON."
JSON_FILE = "Write the figures to this file."
ENGINE_ARGS = "More arguments of vLLM's LLM, as JSON."
TEXT_FROM = "Share of the text where it begins."
TEXT_TO = "Share of the text where it ends."


def once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values in their order, each once."""
    return tuple(dict.fromkeys(values))


def parsed(parse: Callable[[Any], Any]) -> BeforeValidator:
    """An annotation of a field's type: the option is text, which ``parse`` reads."""
    return BeforeValidator(
        lambda given: parse(given) if isinstance(given, str | None) else given
    )


Texts = Annotated[tuple[str, ...], AfterValidator(once)]
Integers = Annotated[tuple[int, ...], AfterValidator(once)]
Floats = Annotated[tuple[float, ...], AfterValidator(once)]
Bytes = Annotated[int, parsed(parse_bytes)]
EngineArgs = Annotated[
    dict[str, Any], parsed(lambda text: json_object("--engine-args", text))
]


def fail(error: Exception | str, status: int = 2) -> NoReturn:
    """Print the error and end the command."""
    _errors.print(f"error: {error}", style="red", highlight=False, markup=False)
    raise typer.Exit(status)


def or_fail(action: Callable[[], _Result]) -> _Result:
    """Run an action; ``fail`` with what is the user's to mend."""
    try:
        return action()
    except typer.Exit:  # a RuntimeError
        raise
    except ValidationError as error:
        fail(explained(error))
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)


def command(settings: type[Any], run: Callable[[Any], None]) -> Callable[..., None]:
    """A command that makes its settings from its options and runs with them.

    Args:
        settings: a dataclass, of pydantic where its fields are validated; the fields
            made by ``option`` and ``argument`` are options, and its docstring is the
            command's help.
        run: what the command does; errors that the user can mend end it.
    """

    def action(**options: Any) -> None:
        or_fail(lambda: run(settings(**options)))

    types = inspect.get_annotations(settings, eval_str=True)
    parameters = [
        _parameter(each, types[each.name])
        for each in fields(settings)
        if "option" in each.metadata
    ]
    action.__doc__ = settings.__doc__
    action.__annotations__ = {part.name: part.annotation for part in parameters}
    vars(action)["__signature__"] = inspect.Signature(parameters)
    return action


def _parameter(field: Field[Any], kind: Any) -> inspect.Parameter:
    """A field as typer takes it: tuples are lists, and what is parsed is text."""
    missing = field.default is MISSING
    default: Any = inspect.Parameter.empty if missing else field.default
    kind, *validators = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if any(isinstance(validator, BeforeValidator) for validator in validators):
        kind = str | None
    elif get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]], list(default)  # type: ignore[misc]
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, field.metadata["option"]],
    )
