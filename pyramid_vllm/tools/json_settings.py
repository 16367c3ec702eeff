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
        why = first_problem(error)[-1]
        raise ValueError(
            f"{option} is '{text}': {why}; valid is a JSON object of settings"
        ) from None


def first_problem(error: ValidationError) -> tuple[str, Any, str]:
    """The setting that pydantic refuses first, its value, and why."""
    problem = error.errors()[0]
    return ".".join(map(str, problem["loc"])), problem["input"], problem["msg"]
