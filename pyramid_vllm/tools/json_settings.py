"""Settings that are given as JSON, and what is wrong with them."""

import json
from typing import Any

from pydantic import ValidationError


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """Settings that an option gives as JSON; of an option not given, none.

    Raises:
        ValueError: not a JSON object.
    """
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{option} is '{text}', which is not JSON: {error}; "
            "valid is a JSON object of settings"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{option} is '{text}': valid is a JSON object of settings")
    return found


def first_problem(error: ValidationError) -> tuple[str, Any, str]:
    """The setting that pydantic refuses first, its value, and why."""
    problem = error.errors()[0]
    return ".".join(map(str, problem["loc"])), problem["input"], problem["msg"]
