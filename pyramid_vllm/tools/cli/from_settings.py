"""Commands whose options are the fields of a settings class, declared there alone."""

from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ValidationError
from pydantic.fields import FieldInfo
from typer.models import ParameterInfo

from pyramid_vllm.tools.cli.failing import or_fail


def from_settings(settings: Any) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """Decorate a function of settings and of further options, if it has any.

    What is the user's to mend ends the command. A model that is not given is the
    bundled one, which is made only when the other options are in order.

    Args:
        settings: a pydantic dataclass. Fields with a typer option or argument in their
            type become options; the others keep their defaults.
    """
    fields = settings.__pydantic_fields__
    own = {name: _parameter(name, field) for name, field in fields.items()}
    parameters = {name: parameter for name, parameter in own.items() if parameter}

    def decorate(function: Callable[..., None]) -> Callable[..., Any]:
        hints = get_type_hints(function, include_extras=True)
        further = [
            parameter.replace(annotation=hints[name])
            for name, parameter in list(signature(function).parameters.items())[1:]
        ]

        def command(**given: Any) -> None:
            options = {name: given.pop(name) for name in parameters}
            or_fail(lambda: function(_settings(settings, options), **given))

        arranged = [*parameters.values(), *further]
        command.__doc__, command.__name__ = function.__doc__, function.__name__
        command.__annotations__ = {p.name: p.annotation for p in arranged}
        command.__signature__ = signature(command).replace(  # type: ignore[attr-defined]
            parameters=[p.replace(kind=Parameter.KEYWORD_ONLY) for p in arranged]
        )
        return command

    return decorate


def _parameter(name: str, field: FieldInfo) -> Parameter | None:
    """The field as typer takes it; None: it is no option."""
    options = [each for each in field.metadata if isinstance(each, ParameterInfo)]
    if not options:
        return None
    kind: Any = field.annotation
    default: Any = None
    if not field.is_required():
        default = field.get_default(call_default_factory=True)
    if any(isinstance(each, BeforeValidator) for each in field.metadata):
        kind = str | None
        default = default if isinstance(default, str) else None
    elif get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]], list(default)  # type: ignore[misc]
    elif field.is_required():
        kind |= None
    return Parameter(
        name,
        Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, options[0]],
    )


def _settings(settings: Any, options: dict[str, Any]) -> Any:
    """The settings; ValueError names the option that is not valid."""
    from pyramid_vllm.tools.cli.model import make_model

    given = {name: value for name, value in options.items() if value is not None}
    try:
        made = settings(**{"model": "", **given})
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        names = ".".join(map(str, first["loc"]))
        message = str(cause or f"{names} is {first['input']!r}: {first['msg']}")
        raise ValueError(message) from None
    return made if "model" in given else replace(made, model=str(make_model()))
