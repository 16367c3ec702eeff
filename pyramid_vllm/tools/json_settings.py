"""Settings that are given as JSON, and what is wrong with them."""

from typing import Any

from pydantic import TypeAdapter, ValidationError

_OBJECT = TypeAdapter(dict[str, Any])


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """Settings that an option gives as JSON; of an option not given, none.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        return {} if text is None else _OBJECT.validate_json(text)
    except ValidationError as error:
        raise ValueError(
            f"{option}: {explained(error)}; valid is a JSON object of settings"
        ) from None


def explained(error: ValidationError) -> str:
    """The setting that pydantic refuses first, its value, and why."""
    problem = error.errors()[0]
    name = ".".join(map(str, problem["loc"])) or "it"
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, Exception):
        return str(cause)
    return f"{name} is {problem['input']!r}: {problem['msg']}"
